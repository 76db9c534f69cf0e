"""How much of the answer a question gives away.

A question that repeats the sentence turns translation into copying: the question itself, handed in as the translation,
then scores without any look at the video. The validator rejects a question that shares more than 30 % of the sentence's
content tokens; the report counts overlaps and copies per split.

Decision on units: words for languages written with blanks, single characters for Chinese. Characters need no
segmenter, whose choice would change the verdict, and they err on the strict side (two words can share a character).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from polymodal.errors import UserError

from slt.data.questions import Question, normalise

__all__ = ["THRESHOLD", "LeakReport", "check_leaks", "content_tokens", "format_reports", "leak_report", "overlap"]

THRESHOLD = 0.3

_DE = """
ab aber als also am an auch auf aus bei bin bis da damit dann das dass dem den der des die dies diese diesem diesen
dieser dieses doch du durch ein eine einem einen einer eines er es etwas euch für gegen hab habe haben hat hatte hier
ich ihm ihn ihnen ihr ihre im in ins ist ja jetzt kann kein keine können man mal mehr mein meine mich mir mit muss nach
nicht noch nun nur ob oder ohne schon sehr sein seine sich sie sind so soll über um und uns unter vom von vor war waren
warum was welche welchem welchen welcher welches wenn wer werden wie wieder wir wird wirst wo woher wohin worum wann zu
zum zur zwischen
"""
_EN = """
a about all am an and any are as at be been but by can could did do does for from had has have he her here him his how i
if in into is it its just me my no not now of off on or our out she should so some that the their them then there these
they this those to too up us very was we were what when where which who whose why will with would you your
"""
_ZH = (
    "的了是在有和与就都而及着或吗呢吧啊呀么什这那哪谁怎样些个们我你您他她它不"
    "没很也还又再要会能可以到去来对把被给让从向为于之其"
)
_STOP = {"de": frozenset(_DE.split()), "en": frozenset(_EN.split()), "zh": frozenset(_ZH)}
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def content_tokens(text: str, language: str) -> frozenset[str]:
    """Distinct tokens of a text that carry content: no punctuation, no stop words.

    Args:
        text: question or sentence.
        language: ``de``, ``de_DE``, ``zh``...; a language without a stop-word list drops punctuation only.

    Returns:
        Lower-cased words, or characters for Chinese. A text of stop words only gives those, so that "was ist das"
        against itself still counts as a copy.
    """
    code = language[:2].lower()
    text = normalise(text)
    tokens = {c for c in text if c.isalnum()} if code == "zh" else set(_WORD.findall(text))
    return frozenset(tokens - _STOP.get(code, frozenset())) or frozenset(tokens)


def overlap(question: str, sentence: str, language: str) -> float:
    """Share of the sentence's content tokens that the question repeats, 0..1; 0 for an empty question or sentence."""
    content = content_tokens(sentence, language)
    return len(content & content_tokens(question, language)) / len(content) if content and question.strip() else 0.0


@dataclass(frozen=True)
class LeakReport:
    """Leakage of one split.

    Attributes:
        split: train, dev or test.
        clips: clips in the split.
        empty: clips with an empty question.
        mean_overlap: mean over the questions that are not empty, 0..1.
        copies: questions equal to the sentence up to case, blanks and punctuation.
        shared: questions that other clips with another sentence have too (one question, several answers).
        rejected: (question, overlap) of the questions above the threshold, in file order.
        threshold: the largest overlap that passes.
        language: language code that chose units and stop words.
    """

    split: str
    clips: int
    empty: int
    mean_overlap: float
    copies: int
    shared: int
    rejected: tuple[tuple[Question, float], ...]
    threshold: float
    language: str

    @property
    def copy_rate(self) -> float:
        """Copies among the questions that are not empty, 0..1."""
        return self.copies / max(1, self.clips - self.empty)


def leak_report(split: str, questions: Iterable[Question], language: str, threshold: float = THRESHOLD) -> LeakReport:
    """Measure one split.

    Args:
        split: name for the report.
        questions: all questions of the split.
        language: language code, chooses units and stop words.
        threshold: largest share of content tokens that a question may repeat, 0..1.

    Raises:
        UserError: threshold outside 0..1.
    """
    if not 0.0 <= threshold <= 1.0:
        raise UserError(f"threshold={threshold}; expected 0 <= threshold <= 1, the share of content tokens (0.3)")
    rows = list(questions)
    asked = [q for q in rows if q.question.strip()]
    shares = [overlap(q.question, q.sentence, language) for q in asked]
    answers: dict[str, set[str]] = {}
    for q in asked:
        answers.setdefault(normalise(q.question), set()).add(normalise(q.sentence))
    return LeakReport(
        split=split,
        clips=len(rows),
        empty=len(rows) - len(asked),
        mean_overlap=sum(shares) / len(shares) if shares else 0.0,
        copies=sum(_letters(q.question) == _letters(q.sentence) for q in asked),
        shared=sum(len(answers[normalise(q.question)]) > 1 for q in asked),
        rejected=tuple((q, s) for q, s in zip(asked, shares, strict=True) if s > threshold + 1e-9),
        threshold=threshold,
        language=language,
    )


def check_leaks(path: Path, report: LeakReport) -> None:
    """Refuse a file with leaking questions.

    Raises:
        UserError: names file and line of the first leaking question, what it shares and how many there are.
    """
    if not report.rejected:
        return
    question, share = report.rejected[0]
    both = content_tokens(question.sentence, report.language) & content_tokens(question.question, report.language)
    where = f"{path}:{question.line}" if question.line else f"{path}"
    raise UserError(
        f"{where}: the question of {question.video_id!r} repeats {100 * share:.0f} % of the sentence's "
        f"content tokens ({', '.join(sorted(both)[:6])}); allowed are {100 * report.threshold:.0f} %; "
        f"{len(report.rejected)} of {report.clips} questions leak: rewrite them, replace them by template questions "
        f"(`slt-data build --source template`), or accept them with --allow_leaks true"
    )


def format_reports(reports: Sequence[LeakReport]) -> str:
    """A Markdown table with one row a split."""
    lines = [
        "| split | clips | without question | mean overlap | above threshold | copies | asked of other sentences too |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        lines.append(
            f"| {r.split} | {r.clips} | {r.empty} | {100 * r.mean_overlap:.1f} % | {len(r.rejected)} "
            f"(> {100 * r.threshold:.0f} %) | {r.copies} ({100 * r.copy_rate:.1f} %) | {r.shared} |"
        )
    return "\n".join(lines)


def _letters(text: str) -> str:
    return "".join(c for c in normalise(text) if c.isalnum())
