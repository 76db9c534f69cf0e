"""Normal forms of answers, and the distance between two."""

from __future__ import annotations

import re

__all__ = ["collapse", "edit_distance", "number", "plain", "vqa_form"]

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS = {word: str(value) for value, word in enumerate(_NUMBERS)} | {"none": "0"}


def collapse(text: str) -> str:
    """Lower case, white space as single blanks."""
    return " ".join(text.lower().split())


def plain(text: str) -> str:
    """``collapse`` without a final period."""
    return collapse(text).removesuffix(".").rstrip()


def vqa_form(text: str) -> str:
    """VQA's form: lower case, no punctuation, no articles, small number words as digits.

    Periods and commas within numbers stay. Contractions are not spelled out anew (the official list of 130 only matters
    for answers without apostrophes).
    """
    text = collapse(text).replace("\n", " ")
    text = re.sub(r"(?<!\d)[.,]|[.,](?!\d)", " ", text)
    text = re.sub(r"[;/\[\]\"{}()=+\\_\-><@`?!:*#|$%^~]", " ", text)
    words = [_WORDS.get(word, word) for word in text.split() if word not in _ARTICLES]
    return " ".join(words)


def number(text: str) -> float | None:
    """The number that a text is (``1,200``, ``12 %`` = .12, ``$5``); None for other texts."""
    text = text.strip().replace(",", "").lstrip("$€£")
    percent = text.endswith("%")
    try:
        value = float(text.removesuffix("%").strip())
    except ValueError:
        return None
    if value != value or value in (float("inf"), float("-inf")):
        return None
    return value / 100 if percent else value


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: least insertions, deletions, substitutions."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]
