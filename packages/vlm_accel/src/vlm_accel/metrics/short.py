"""Short free answers: ANLS, VQA soft accuracy, relaxed accuracy, exact match (iLLaVA 4.1, LightVLM 4)."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_accel.metrics.text import collapse, edit_distance, number, plain, vqa_form

__all__ = ["anls", "exact", "open_match", "relaxed", "vqa_accuracy"]


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity: 1 - d / max(len), best over answers; below the threshold 0.

    Source: iLLaVA 4.1 (DocVQA, InfoVQA).
    """
    found = collapse(prediction)
    best = 0.0
    for answer in answers:
        wanted = collapse(answer)
        longest = max(len(found), len(wanted))
        best = max(best, 1 - edit_distance(found, wanted) / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA soft accuracy: mean over leaving one of the answers out of min(1, matches among the others / 3).

    With a single answer: 1 where it matches. Source: iLLaVA 4.1 (TextVQA).
    """
    found = vqa_form(prediction)
    matches = [vqa_form(answer) == found for answer in answers]
    if len(matches) < 2:
        return float(any(matches))
    total = sum(matches)
    return sum(min(1.0, (total - own) / 3) for own in matches) / len(matches)


def relaxed(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """ChartQA: numbers within 5 % of a non-zero target, else equality without case; best over answers.

    Source: iLLaVA 4.1.
    """
    return max((_relaxed(prediction, answer, tolerance) for answer in answers), default=0.0)


def _relaxed(prediction: str, answer: str, tolerance: float) -> float:
    found, wanted = number(prediction), number(answer)
    if found is not None and wanted:
        return float(abs(found - wanted) / abs(wanted) <= tolerance)
    return float(plain(prediction) == plain(answer))


def exact(prediction: str, answers: Sequence[str]) -> float:
    """Equality after lower-casing and stripping a final period (LightVLM 4, RealWorldQA); best over answers."""
    return float(any(plain(prediction) == plain(answer) for answer in answers))


def open_match(prediction: str, answers: Sequence[str]) -> float:
    """MMMU's open questions: the normal form of an answer stands in the prediction, or the last number equals it.

    Source: iLLaVA 4.1 ("normalised string or number match"); the details are ours.
    """
    found = plain(prediction)
    last = next((value for word in reversed(found.split()) if (value := number(word.strip("=.:"))) is not None), None)
    for answer in answers:
        wanted, value = plain(answer), number(answer)
        if found == wanted or (value is None and f" {wanted} " in f" {found} "):
            return 1.0
        if value is not None and last is not None and abs(last - value) <= 1e-2 * max(abs(value), 1e-9):
            return 1.0
    return 0.0
