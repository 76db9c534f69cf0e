"""Scores of translations, each with a signature that says how it was worked out.

Scores are 0..100, ``word_accuracy`` is 0..1. Level ``word`` splits at blanks, level ``char`` into single characters
(Chinese). Texts are scored as they are: lower-casing and full stops are the caller's, and the signature's to report.

Source: SSL-SSAW (arXiv 2509.14036), our reading, section 4.5; BLEU and chrF statistics come from sacrebleu.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import sacrebleu
from polymodal.errors import UserError
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from slt.ops.corrupt import check_level, split_units

__all__ = [
    "ROUGE_VARIANTS",
    "UniqueScores",
    "bleu",
    "bleu_signature",
    "chrf",
    "chrf_signature",
    "rouge_l",
    "rouge_signature",
    "scores",
    "signatures",
    "unique_sentence_scores",
    "word_accuracy",
    "word_accuracy_signature",
]

ROUGE_VARIANTS = ("coco", "slrt")
_ORDERS = 4
_COCO_BETA = 1.2


def _check(references: Sequence[str], hypotheses: Sequence[str], level: str = "word") -> None:
    check_level(level)
    for name, texts in (("references", references), ("hypotheses", hypotheses)):
        if isinstance(texts, str):
            raise UserError(f"{name} is one string; expected a list of sentences")
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"{name}[{number}] is {type(text).__name__}; expected a string ('' for no output)")
    if len(references) != len(hypotheses):
        raise UserError(f"{len(references)} references with {len(hypotheses)} hypotheses; expected one for each")
    if not references:
        raise UserError("no sentence to score; expected at least one reference")


def _spaced(texts: Sequence[str], level: str) -> list[str]:
    return [" ".join(split_units(text, level)) for text in texts]


@dataclass(frozen=True)
class _Counts:
    """Sufficient statistics of BLEU; fractions where sentences are weighted."""

    matches: tuple[float, ...]
    totals: tuple[float, ...]
    hypothesis_length: float
    reference_length: float

    def scores(self) -> list[float]:
        """BLEU-1..4; 0 from the first order without a match on."""
        if self.hypothesis_length == 0:
            return [0.0] * _ORDERS
        penalty = min(0.0, 1.0 - self.reference_length / self.hypothesis_length)
        result, log_sum = [0.0] * _ORDERS, 0.0
        for order, (match, total) in enumerate(zip(self.matches, self.totals, strict=True), start=1):
            if match == 0:
                break
            log_sum += math.log(match / total)
            result[order - 1] = 100.0 * math.exp(penalty + log_sum / order)
        return result


def bleu(references: Sequence[str], hypotheses: Sequence[str], level: str = "word") -> list[float]:
    """Corpus BLEU-1..4: cumulative, one reference, no smoothing, no effective order.

    The same as sacrebleu with ``tokenize="none"``, ``smooth_method="none"`` on words, and with ``tokenize="zh"`` on
    plain Chinese characters. BLEU-n is 0 where any order up to n has no match; sacrebleu's defaults would smooth.

    Args:
        references: N >= 1 sentences.
        hypotheses: N sentences.
        level: ``word`` or ``char`` (blanks in the text do not count).

    Returns:
        Four scores, 0..100.

    Raises:
        UserError: lists of unequal length, no sentence, or an unknown level.
    """
    _check(references, hypotheses, level)
    metric = BLEU(tokenize="none", smooth_method="none", effective_order=False, force=True)
    found = metric.corpus_score(_spaced(hypotheses, level), [_spaced(references, level)])
    return _Counts(tuple(found.counts), tuple(found.totals), found.sys_len, found.ref_len).scores()


def _rouge_tokens(text: str, level: str) -> list[str]:
    """Tokens as the field's scripts see them: an empty text is one empty token, a blank between characters two."""
    return " ".join(text.split() if level == "word" else text).split(" ")


def _lcs(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence; a row of the table is one integer's bits (Allison and Dix 1986)."""
    places: dict[str, int] = {}
    for position, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << position
    row = 0
    for token in second:
        reached = row | places.get(token, 0)
        row = reached & ((reached - (row << 1 | 1)) ^ reached)
    return row.bit_count()


def _sentence_rouge(reference: str, hypothesis: str, level: str, variant: str) -> float:
    expected, got = _rouge_tokens(reference, level), _rouge_tokens(hypothesis, level)
    common = _lcs(expected, got)
    if common == 0:
        return 0.0
    precision, recall = common / len(got), common / len(expected)
    beta = _COCO_BETA if variant == "coco" else precision / (recall + 1e-12)
    return 100.0 * (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _rouge_all(references: Sequence[str], hypotheses: Sequence[str], level: str, variant: str) -> list[float]:
    _check(references, hypotheses, level)
    if variant not in ROUGE_VARIANTS:
        raise UserError(f"unknown ROUGE-L variant {variant!r}; known: {', '.join(ROUGE_VARIANTS)}")
    return [_sentence_rouge(r, h, level, variant) for r, h in zip(references, hypotheses, strict=True)]


def rouge_l(references: Sequence[str], hypotheses: Sequence[str], level: str = "word", variant: str = "coco") -> float:
    """ROUGE-L: the mean over sentences of F = (1 + b^2) P R / (R + b^2 P), with P = LCS/|h| and R = LCS/|r|.

    The two variants in use give different numbers, so name the one you print. Tokens follow the field's scripts:
    level split, joined by one blank, split at every single blank. An empty text is thus one empty token (empty
    hypothesis: 0; both empty: 100), and in char mode a blank in the text is two empty tokens, which an empty
    hypothesis then matches.

    Args:
        references: N >= 1 sentences.
        hypotheses: N sentences.
        level: ``word`` or ``char``.
        variant: ``coco`` (b = 1.2; most tables) or ``slrt`` (b = P / (R + 1e-12); SLRT and Uni-Sign).

    Returns:
        Score, 0..100.

    Raises:
        UserError: lists of unequal length, no sentence, unknown level or variant.
    """
    values = _rouge_all(references, hypotheses, level, variant)
    return math.fsum(values) / len(values)


def chrf(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Corpus chrF of sacrebleu: character n-grams up to 6, no word n-grams, beta 2, blanks ignored.

    Args:
        references: N >= 1 sentences.
        hypotheses: N sentences.

    Returns:
        Score, 0..100.

    Raises:
        UserError: lists of unequal length, or no sentence.
    """
    _check(references, hypotheses)
    return float(CHRF().corpus_score(list(hypotheses), [list(references)]).score)


def word_accuracy(references: Sequence[str], hypotheses: Sequence[str], level: str = "word") -> float:
    """Share of reference units that the hypothesis has at the same position, over the whole corpus.

    Sum over sentences of [h_i = r_i] for i < |r|, divided by the sum of |r|. A missing unit is wrong, a unit beyond the
    reference's end is not counted. Meant for the synthetic world, where word i answers sign i: one word too many
    early on makes everything after it wrong.

    Args:
        references: N >= 1 sentences.
        hypotheses: N sentences.
        level: ``word`` or ``char``.

    Returns:
        Share, 0..1; 0 when no reference has a unit.

    Raises:
        UserError: lists of unequal length, no sentence, or an unknown level.
    """
    _check(references, hypotheses, level)
    right = total = 0
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        expected = split_units(reference, level)
        right += sum(r == h for r, h in zip(expected, split_units(hypothesis, level), strict=False))
        total += len(expected)
    return right / total if total else 0.0


@dataclass(frozen=True)
class UniqueScores:
    """Scores in which every different reference sentence counts once.

    Args:
        sentences: number of different references.
        bleu: BLEU-1..4, 0..100.
        rouge_l_coco: ROUGE-L, b = 1.2.
        rouge_l_slrt: ROUGE-L, b = P/R.
    """

    sentences: int
    bleu: list[float]
    rouge_l_coco: float
    rouge_l_slrt: float


def unique_sentence_scores(references: Sequence[str], hypotheses: Sequence[str], level: str = "word") -> UniqueScores:
    """Scores per unique sentence: a sentence recorded in many takes weighs no more than one recorded once.

    Items are grouped by the units of their reference, and a hypothesis weighs 1/takes. BLEU's statistics (matches,
    totals, lengths) are averaged inside a group and then summed over groups, so BLEU stays a corpus score; ROUGE-L is
    the mean over groups of the mean over takes. No take is picked, so the order of items does not matter. Degenerate
    case: where all references differ, the scores are those of ``bleu`` and ``rouge_l``.

    Args:
        references: N >= 1 sentences.
        hypotheses: N sentences.
        level: ``word`` or ``char``.

    Returns:
        The scores and the number of different sentences.

    Raises:
        UserError: lists of unequal length, no sentence, or an unknown level.
    """
    coco = _rouge_all(references, hypotheses, level, "coco")
    slrt = _rouge_all(references, hypotheses, level, "slrt")
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(_spaced(references, level)):
        groups.setdefault(key, []).append(index)
    # effective_order only silences a notice of sacrebleu here: the counts are taken, not the sentence's score.
    metric = BLEU(tokenize="none", smooth_method="none", effective_order=True, force=True)
    totals = [0.0] * (2 * _ORDERS + 2)
    for key, members in groups.items():
        for hypothesis in _spaced([hypotheses[i] for i in members], level):
            found = metric.sentence_score(hypothesis, [key])
            for slot, value in enumerate([*found.counts, *found.totals, found.sys_len, found.ref_len]):
                totals[slot] += value / len(members)
    counts = _Counts(tuple(totals[:_ORDERS]), tuple(totals[_ORDERS : 2 * _ORDERS]), totals[-2], totals[-1])

    def average(values: list[float]) -> float:
        return math.fsum(math.fsum(values[i] for i in members) / len(members) for members in groups.values()) / len(
            groups
        )

    return UniqueScores(len(groups), counts.scores(), average(coco), average(slrt))


def scores(references: Sequence[str], hypotheses: Sequence[str], level: str = "word") -> dict[str, float]:
    """Every score of this module by name.

    Args:
        references: N >= 1 sentences.
        hypotheses: N sentences.
        level: ``word`` or ``char``.

    Returns:
        ``bleu1..bleu4``, ``rouge_l`` (coco), ``rouge_l_slrt``, ``chrf``, ``bleu4_unique`` (0..100), ``word_accuracy``
        (0..1).

    Raises:
        UserError: lists of unequal length, no sentence, or an unknown level.
    """
    result = {f"bleu{n}": value for n, value in enumerate(bleu(references, hypotheses, level), start=1)}
    result["rouge_l"] = rouge_l(references, hypotheses, level, "coco")
    result["rouge_l_slrt"] = rouge_l(references, hypotheses, level, "slrt")
    result["chrf"] = chrf(references, hypotheses)
    result["bleu4_unique"] = unique_sentence_scores(references, hypotheses, level).bleu[3]
    result["word_accuracy"] = word_accuracy(references, hypotheses, level)
    return result


def _common(lowercase: bool, append_period: bool) -> str:
    return f"case:{'lc' if lowercase else 'mixed'}|period:{'added' if append_period else 'as-is'}"


def bleu_signature(
    level: str = "word", lowercase: bool = False, append_period: bool = False, *, unique: bool = False
) -> str:
    """How a BLEU score was worked out.

    Args:
        level: ``word`` or ``char``.
        lowercase: whether texts were lower-cased.
        append_period: whether `` .`` was appended to every reference sentence.
        unique: whether every different reference counts once (``unique_sentence_scores``).

    Returns:
        One line, such as ``BLEU|nrefs:1|case:lc|period:as-is|eff:no|tok:word|smooth:none|sacrebleu:2.6.0``.
    """
    weight = "|per:unique-sentence" if unique else ""
    rest = f"eff:no|tok:{level}|smooth:none{weight}|sacrebleu:{sacrebleu.__version__}"
    return f"BLEU|nrefs:1|{_common(lowercase, append_period)}|{rest}"


def rouge_signature(
    level: str = "word", variant: str = "coco", lowercase: bool = False, append_period: bool = False
) -> str:
    """How a ROUGE-L score was worked out.

    Args:
        level: ``word`` or ``char``.
        variant: ``coco`` or ``slrt``.
        lowercase: whether texts were lower-cased.
        append_period: whether `` .`` was appended to every reference sentence.

    Returns:
        One line, such as ``ROUGE-L|nrefs:1|case:lc|period:as-is|tok:word|beta:1.2|variant:coco|mean:sentence``.
    """
    beta = "1.2" if variant == "coco" else "P/R"
    return (
        f"ROUGE-L|nrefs:1|{_common(lowercase, append_period)}|tok:{level}|beta:{beta}|variant:{variant}|mean:sentence"
    )


def chrf_signature(lowercase: bool = False, append_period: bool = False) -> str:
    """How a chrF score was worked out.

    Args:
        lowercase: whether texts were lower-cased.
        append_period: whether `` .`` was appended to every reference sentence.

    Returns:
        One line with sacrebleu's version.
    """
    rest = f"eff:yes|nc:6|nw:0|beta:2|space:no|sacrebleu:{sacrebleu.__version__}"
    return f"chrF|nrefs:1|{_common(lowercase, append_period)}|{rest}"


def word_accuracy_signature(level: str = "word", lowercase: bool = False, append_period: bool = False) -> str:
    """How a word accuracy was worked out.

    Args:
        level: ``word`` or ``char``.
        lowercase: whether texts were lower-cased.
        append_period: whether `` .`` was appended to every reference sentence.

    Returns:
        One line.
    """
    return f"ACC|nrefs:1|{_common(lowercase, append_period)}|tok:{level}|match:position|over:reference-length"


def signatures(level: str = "word", lowercase: bool = False, append_period: bool = False) -> dict[str, str]:
    """The signature of every entry of ``scores``, by the same names.

    Args:
        level: ``word`` or ``char``.
        lowercase: whether texts were lower-cased.
        append_period: whether `` .`` was appended to every reference sentence.

    Returns:
        Name -> signature.
    """
    result = {f"bleu{n}": bleu_signature(level, lowercase, append_period) for n in range(1, _ORDERS + 1)}
    result["rouge_l"] = rouge_signature(level, "coco", lowercase, append_period)
    result["rouge_l_slrt"] = rouge_signature(level, "slrt", lowercase, append_period)
    result["chrf"] = chrf_signature(lowercase, append_period)
    result["bleu4_unique"] = bleu_signature(level, lowercase, append_period, unique=True)
    result["word_accuracy"] = word_accuracy_signature(level, lowercase, append_period)
    return result
