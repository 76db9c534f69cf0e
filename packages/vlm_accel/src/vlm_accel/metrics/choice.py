"""Letters and yes / no: parsing, circular check, MMStar, MME (iLLaVA 4.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["by_category", "circular", "mme", "parse_letter", "parse_yes_no"]

LETTERS = "ABCDEFGHIJ"
PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "ocr"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def parse_letter(text: str, options: Sequence[str] = ()) -> str | None:
    """The option's letter that a text names; None where it names none.

    In this order: a letter alone or at the start (``B``, ``(B)``, ``B. cat``), ``answer is B``, a letter in brackets,
    exactly one option's text within it, one capital letter by itself.

    Args:
        text: what the model said.
        options: texts of the options; their number says which letters there are (none given: A to J).
    """
    letters = LETTERS[: len(options) or len(LETTERS)]
    text = text.strip()
    found = re.match(rf"\(?([{letters}])\)?(?:[.:,)]|\s*$)", text)
    found = found or re.search(rf"(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([{letters}])\b", text, re.IGNORECASE)
    found = found or re.search(rf"\(([{letters}])\)", text)
    if found:
        return found[1].upper()
    lower = text.lower().rstrip(".")
    named = [letter for letter, option in zip(letters, options, strict=False) if option and option.lower() in lower]
    if len(named) == 1:
        return named[0]
    alone = set(re.findall(rf"\b([{letters}])\b", text)) - ({"A"} if text.startswith("A ") else set())
    return alone.pop() if len(alone) == 1 else None


def parse_yes_no(text: str) -> str | None:
    """``yes`` or ``no`` at the start of a text, or the only one of them in it; None otherwise."""
    words = re.findall(r"[a-z]+", text.lower())
    if words and words[0] in ("yes", "no"):
        return words[0]
    found = {word for word in words if word in ("yes", "no")}
    return found.pop() if len(found) == 1 else None


def circular(right: Sequence[bool], groups: Sequence[str]) -> float:
    """MMBench's circular evaluation: a question counts where all variants of it (options turned round) are right.

    Args:
        right: whether each variant is.
        groups: the question each belongs to; a question without variants is a group of one.
    """
    whole: dict[str, bool] = {}
    for ok, group in zip(right, groups, strict=True):
        whole[group] = whole.get(group, True) and ok
    return sum(whole.values()) / max(1, len(whole))


def by_category(values: Sequence[float], categories: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Mean of the categories' means (MMStar), and those."""
    found: dict[str, list[float]] = {}
    for value, category in zip(values, categories, strict=True):
        found.setdefault(category, []).append(value)
    means = {name: sum(part) / len(part) for name, part in found.items()}
    return sum(means.values()) / max(1, len(means)), means


def mme(right: Sequence[bool], categories: Sequence[str], images: Sequence[str]) -> dict[str, float]:
    """MME: per subtask accuracy % + accuracy+ % (all questions about an image right); sums over both parts.

    Args:
        right: whether each question is.
        categories: subtask of each.
        images: picture of each.
    """
    scores: dict[str, float] = {}
    for name in dict.fromkeys(categories):
        mine = [(ok, image) for ok, kind, image in zip(right, categories, images, strict=True) if kind == name]
        plus = circular([ok for ok, _ in mine], [image for _, image in mine])
        scores[name] = 100 * sum(ok for ok, _ in mine) / len(mine) + 100 * plus
    lower = {name.lower().replace(" ", "_"): value for name, value in scores.items()}
    return {
        "perception": sum(value for name, value in lower.items() if name in PERCEPTION),
        "cognition": sum(value for name, value in lower.items() if name in COGNITION),
        "total": sum(lower.values()),
    }
