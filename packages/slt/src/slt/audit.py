"""The audited report: a model's scores next to what can be had without the video.

A question may give its answer away: returned as the translation, it then scores although nobody looked at the signing.
A score of question-based translation therefore says nothing about signing unless these rows stand next to it.

Source: SSL-SSAW (arXiv 2509.14036), our reading, section 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from polymodal.errors import UserError

from slt.metrics import scores, signatures
from slt.no_video import QuestionSentence, copy_question, question_1nn
from slt.ops.corrupt import split_units

__all__ = ["COLUMNS", "AuditReport", "AuditRow", "Overlap", "audit_report", "overlap_rate"]

COLUMNS: dict[str, str] = {
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "rouge_l": "ROUGE-L coco",
    "rouge_l_slrt": "ROUGE-L slrt",
    "chrf": "chrF",
    "bleu4_unique": "BLEU-4 unique",
}
"""Score -> column heading, in order."""

_COMPUTED = ("copy_question", "question_1nn")
_QUESTION_MARKS = "?？"


class Overlap(NamedTuple):
    """How much of the sentences their questions give away.

    Args:
        rate: mean over items of the share of the sentence's units that occur in the question, 0..1.
        equal: items whose question is the sentence, up to question marks at the end.
        items: number of items.
    """

    rate: float
    equal: int
    items: int


def _stem(text: str, level: str) -> list[str]:
    return split_units(text.rstrip().rstrip(_QUESTION_MARKS), level)


def overlap_rate(questions: Sequence[str], sentences: Sequence[str], level: str = "word") -> Overlap:
    """Share of each sentence's units that occur in its question, averaged, and how many questions are the sentence.

    Every occurrence of a unit in the sentence counts, punctuation too; a sentence without units counts as 0. For
    ``equal``, question marks (half or full width) at the end are dropped from both texts and units are compared;
    empty questions are never equal.

    Args:
        questions: N >= 1 questions; may be empty strings.
        sentences: N sentences.
        level: ``word`` or ``char``.

    Returns:
        ``(rate, equal, items)``.

    Raises:
        UserError: lists of unequal length, no item, or an unknown level.
    """
    if len(questions) != len(sentences):
        raise UserError(f"{len(questions)} questions with {len(sentences)} sentences; expected one for each")
    if not questions:
        raise UserError("no item to compare; expected at least one question and sentence")
    share, equal = 0.0, 0
    for question, sentence in zip(questions, sentences, strict=True):
        known, units = set(split_units(question, level)), split_units(sentence, level)
        share += sum(unit in known for unit in units) / len(units) if units else 0.0
        stem = _stem(question, level)
        equal += bool(stem) and stem == _stem(sentence, level)
    return Overlap(share / len(questions), equal, len(questions))


@dataclass(frozen=True)
class AuditRow:
    """One line of the report.

    Args:
        name: what made the translations.
        scores: score by name; see ``COLUMNS``, and ``word_accuracy`` (0..1).
    """

    name: str
    scores: dict[str, float]


@dataclass(frozen=True)
class AuditReport:
    """Scores of a model next to baselines that see no video, with signatures and a verdict in words.

    Args:
        rows: one per prediction list, in the order given, then the rows computed here.
        model: name of the row that is audited.
        level: ``word`` or ``char``.
        overlap: overlap of questions and references.
        unique_sentences: number of different references.
        signatures: signature by score.
        verdict: one line.
        notes: what was left out and why.
    """

    rows: list[AuditRow]
    model: str
    level: str
    overlap: Overlap
    unique_sentences: int
    signatures: dict[str, str]
    verdict: str
    notes: list[str] = field(default_factory=list)

    def row(self, name: str) -> AuditRow:
        """The row called ``name`` (KeyError if there is none)."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {**asdict(self), "overlap": self.overlap._asdict()}

    def to_markdown(self) -> str:
        """A Markdown table, the overlap, the verdict and the signatures."""
        head = ["", *COLUMNS.values()]
        lines = [self._line(head), self._line(["---", *["---:"] * len(COLUMNS)])]
        lines += [self._line(cells) for cells in self._cells()]
        lines += ["", self._overlap_line(), "", f"**{self.verdict}**", *(f"\n{note}" for note in self.notes), ""]
        return "\n".join([*lines, *(f"- {title}: `{text}`" for title, text in self._signature_lines())]) + "\n"

    def to_text(self) -> str:
        """The same as aligned plain text, for a terminal."""
        table = [["", *COLUMNS.values()], *self._cells()]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in table
        ]
        lines += ["", self._overlap_line(), self.verdict, *self.notes, ""]
        return "\n".join([*lines, *(f"{title}: {text}" for title, text in self._signature_lines())]) + "\n"

    @staticmethod
    def _line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def _cells(self) -> list[list[str]]:
        return [[row.name, *(f"{row.scores[key]:.2f}" for key in COLUMNS)] for row in self.rows]

    def _overlap_line(self) -> str:
        rate, equal, items = self.overlap
        unit = "words" if self.level == "word" else "characters"
        return (
            f"{items} items, {self.unique_sentences} different sentences; on average {100 * rate:.1f} % of a "
            f"sentence's {unit} stand in its question; {equal} questions equal the sentence up to the question mark"
        )

    def _signature_lines(self) -> list[tuple[str, str]]:
        """One line per signature; BLEU-1..4 share theirs."""
        titles: dict[str, list[str]] = {}
        for key, title in COLUMNS.items():
            titles.setdefault(self.signatures[key], []).append(title)
        return [(names[0] if len(names) == 1 else f"{names[0]}..{names[-1][-1]}", s) for s, names in titles.items()]


@dataclass(frozen=True)
class _Pair:
    question: str
    sentence: str


def _lowered(texts: Sequence[str], lowercase: bool) -> list[str]:
    return [text.lower() for text in texts] if lowercase else list(texts)


def _no_video_rows(
    questions: list[str], train_items: Sequence[QuestionSentence], level: str, lowercase: bool
) -> tuple[dict[str, list[str]], list[str]]:
    """Predictions of the rows computed here, and notes on those left out."""
    if not any(question.strip() for question in questions):
        return {}, ["No item has a question: copy_question and question_1nn do not apply."]
    items = [_Pair(question, "") for question in questions]
    made = {"copy_question": copy_question(items)}
    if not train_items:
        return made, ["question_1nn left out: no training items were given."]
    train = [_Pair(*_lowered((item.question, item.sentence), lowercase)) for item in train_items]
    made["question_1nn"] = question_1nn(train, items, level)
    empty = sum(not question.strip() for question in questions)
    return made, [f"{empty} of {len(questions)} items have no question."] if empty else []


def _verdict(rows: Sequence[AuditRow], model: str) -> str:
    """What the scores say about the model, in words."""
    bleu4 = {row.name: row.scores["bleu4"] for row in rows}
    own = bleu4[model]
    reasons = {
        "copy_question": "the model does not beat copying the question: this score says nothing about signing",
        "question_1nn": "the model does not beat the answer to the nearest training question: this score says nothing "
        "about signing",
        "question_only": "the model does not beat a model that sees the question only: this score says nothing about "
        "signing",
        "shuffled_question": "the model does as well with other items' questions: the question is not used",
        "empty_question": "the model does as well without a question: the question is not used",
    }
    for name, words in reasons.items():
        if name != model and name in bleu4 and own <= bleu4[name]:
            return f"{words} (BLEU-4 {own:.2f} against {bleu4[name]:.2f})"
    blind = {name: bleu4[name] for name in (*_COMPUTED, "question_only") if name in bleu4 and name != model}
    if not blind:
        return f"BLEU-4 {own:.2f}; nothing without video to compare with"
    best = max(blind, key=lambda name: blind[name])
    return f"the model is {own - blind[best]:.2f} BLEU-4 above the best translation without video ({best})"


def audit_report(
    references: Sequence[str],
    questions: Sequence[str],
    predictions: Mapping[str, Sequence[str]],
    train_items: Sequence[QuestionSentence] = (),
    level: str = "word",
    *,
    model: str | None = None,
    lowercase: bool = False,
    append_period: bool = False,
) -> AuditReport:
    """Score predictions next to ``copy_question`` and ``question_1nn``, which are computed here.

    Args:
        references: N >= 1 sentences.
        questions: N questions; an empty string where there is none.
        predictions: name -> N hypotheses. ``question_only``, ``shuffled_question`` and ``empty_question`` are known to
            the verdict; other names are rows like any.
        train_items: training questions and sentences for ``question_1nn``; none leaves the row out.
        level: ``word`` or ``char``.
        model: the row to audit; the first of ``predictions`` if not given.
        lowercase: lower-case all texts before scoring.
        append_period: whether the references already end in an appended `` .``; for the signatures only.

    Returns:
        The report.

    Raises:
        UserError: lists of unequal length, nothing to score, or a name that is computed here.
    """
    if not predictions:
        raise UserError("no predictions to audit; expected name -> list of hypotheses")
    model = next(iter(predictions)) if model is None else model
    if model not in predictions:
        raise UserError(f"model={model!r} is not among the predictions: {', '.join(predictions)}")
    for name, hypotheses in predictions.items():
        if name in _COMPUTED:
            raise UserError(f"predictions named {name!r}: this row is computed from the questions; choose another name")
        if len(hypotheses) != len(references):
            raise UserError(f"predictions {name!r} has {len(hypotheses)} sentences for {len(references)} references")
    sentences, asked = _lowered(references, lowercase), _lowered(questions, lowercase)
    overlap = overlap_rate(asked, sentences, level)
    made, notes = _no_video_rows(asked, train_items, level, lowercase)
    texts = {**{name: _lowered(hypotheses, lowercase) for name, hypotheses in predictions.items()}, **made}
    rows = [AuditRow(name, scores(sentences, hypotheses, level)) for name, hypotheses in texts.items()]
    return AuditReport(
        rows=rows,
        model=model,
        level=level,
        overlap=overlap,
        unique_sentences=len({tuple(split_units(sentence, level)) for sentence in sentences}),
        signatures=signatures(level, lowercase, append_period),
        verdict=_verdict(rows, model),
        notes=notes,
    )
