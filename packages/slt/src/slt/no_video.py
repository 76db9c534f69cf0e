"""Translations made without looking at the video: what the questions alone are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from polymodal.errors import UserError

from slt.ops.corrupt import split_units

__all__ = ["QuestionSentence", "copy_question", "question_1nn"]


class QuestionSentence(Protocol):
    """Anything with a question and a sentence, such as ``slt.data.base.Item``."""

    @property
    def question(self) -> str:
        """The question asked; may be empty."""

    @property
    def sentence(self) -> str:
        """The answer that was signed."""


def copy_question(items: Sequence[QuestionSentence]) -> list[str]:
    """Return each item's question, unchanged, as its translation.

    Args:
        items: test items.

    Returns:
        One text per item; empty where there is no question.
    """
    return [item.question for item in items]


def question_1nn(
    train_items: Sequence[QuestionSentence], items: Sequence[QuestionSentence], level: str = "word"
) -> list[str]:
    """Answer with the sentence of the training item whose question is nearest.

    Nearness is the Jaccard index of the sets of question units, |A and B| / |A or B|, and 0 when both are empty. The
    first training item wins a tie, so an item without a question gets the first training sentence.

    Args:
        train_items: training items, at least one.
        items: test items.
        level: ``word`` or ``char``: units of questions.

    Returns:
        One training sentence per item.

    Raises:
        UserError: no training item, or an unknown level.

    Source:
        SSL-SSAW (arXiv 2509.14036), our reading, sections 4.3 and 5.
    """
    if not train_items:
        raise UserError("question_1nn needs training items with questions; none were given")
    # Questions repeat a lot: keep one row per set of units, that of its first item, in order of appearance.
    firsts: dict[frozenset[str], str] = {}
    for item in train_items:
        firsts.setdefault(frozenset(split_units(item.question, level)), item.sentence)
    answers = list(firsts.values())
    sizes = np.array([len(units) for units in firsts], dtype=np.int64)
    postings: dict[str, list[int]] = {}
    for row, units in enumerate(firsts):
        for unit in units:
            postings.setdefault(unit, []).append(row)
    rows = {unit: np.array(found, dtype=np.int64) for unit, found in postings.items()}

    def nearest(units: frozenset[str]) -> str:
        shared = np.zeros(len(answers), dtype=np.int64)
        for unit in units & rows.keys():
            shared[rows[unit]] += 1
        # argmax takes the first of equals; equal ratios of small integers are equal floats.
        return answers[int(np.argmax(shared / np.maximum(sizes + len(units) - shared, 1)))]

    known: dict[frozenset[str], str] = {}
    result = []
    for item in items:
        units = frozenset(split_units(item.question, level))
        if units not in known:
            known[units] = nearest(units)
        result.append(known[units])
    return result
