from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from slt.no_video import copy_question, question_1nn


@dataclass(frozen=True)
class Pair:
    question: str
    sentence: str = ""


questions = st.lists(st.sampled_from("abcdef"), max_size=5).map(" ".join)


def slow_1nn(train, items, split):
    """Every pair compared, exact fractions."""
    from fractions import Fraction

    answers = []
    for item in items:
        best = None
        for candidate in train:
            first, second = set(split(item.question)), set(split(candidate.question))
            union = len(first | second)
            likeness = Fraction(len(first & second), union) if union else Fraction(0)
            if best is None or likeness > best[0]:
                best = (likeness, candidate.sentence)
        answers.append(best[1])
    return answers


@settings(deadline=None, max_examples=100)
@given(st.lists(questions, min_size=1, max_size=20), st.lists(questions, max_size=6))
def test_agrees_with_comparing_every_pair(train_questions, test_questions):
    train = [Pair(q, f"sentence {i}") for i, q in enumerate(train_questions)]
    items = [Pair(q) for q in test_questions]
    assert question_1nn(train, items) == slow_1nn(train, items, str.split)
    assert question_1nn(train, items, "char") == slow_1nn(train, items, lambda text: list(text.replace(" ", "")))


def test_the_first_training_item_wins_a_tie():
    train = [Pair("what now", "first"), Pair("now what", "second"), Pair("what", "third")]
    assert question_1nn(train, [Pair("what now"), Pair("what"), Pair("nothing"), Pair("")]) == [
        "first",
        "third",
        "first",
        "first",
    ]


def test_repeated_units_count_once():
    train = [Pair("a b", "plain"), Pair("a a a c", "repeated")]
    assert question_1nn(train, [Pair("a c c")]) == ["repeated"]


def test_characters():
    train = [Pair("你喜欢什么？", "我喜欢茶"), Pair("天气怎么样？", "天气很好")]
    assert question_1nn(train, [Pair("明天天气好吗？")], "char") == ["天气很好"]


def test_copying_returns_the_question_unchanged():
    assert copy_question([Pair("Wie wird das Wetter ?"), Pair("")]) == ["Wie wird das Wetter ?", ""]


def test_needs_training_items():
    with pytest.raises(UserError, match="needs training items"):
        question_1nn([], [Pair("a")])
