import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from slt.ops.corrupt import KINDS, MASK, corrupt, omit, omit_last, span, split_units

texts = st.lists(st.sampled_from(["der", "regen", "zieht", "ab", "."]), max_size=30)
rates = st.floats(0, 1)


@pytest.mark.parametrize(
    ("count", "u", "masked"), [(7, 0.10, 1), (7, 0.1499, 2), (1, 0.01, 1), (20, 0.15, 3), (20, 0.051, 2), (9, 0.0, 0)]
)
def test_omit_last_numbers_of_the_specification(count, u, masked):
    words = [f"w{i}" for i in range(count)]
    assert omit_last(words, 0.15, u) == words[: count - masked] + [MASK] * masked


@settings(deadline=None)
@given(texts, rates, rates)
def test_omit_last_keeps_length_and_prefix(words, rate, share):
    u = rate * share
    result = omit_last(words, rate, u)
    k = math.ceil(len(words) * u)
    assert len(result) == len(words)
    assert result[: len(words) - k] == words[: len(words) - k]
    assert result[len(words) - k :] == [MASK] * k


@settings(deadline=None)
@given(texts, rates, st.integers(0, 10_000), st.sampled_from(KINDS))
def test_every_kind_keeps_length_and_all_unmasked_units(words, rate, seed, kind):
    result = corrupt(words, kind, rate, torch.Generator().manual_seed(seed))
    assert len(result) == len(words)
    assert all(new in (old, MASK) for new, old in zip(result, words, strict=True))
    assert result.count(MASK) <= math.ceil(len(words) * rate)
    assert result == corrupt(words, kind, rate, torch.Generator().manual_seed(seed))
    assert corrupt(words, kind, rate, None) == words


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(0, 1000))
def test_span_is_one_stretch(count, seed):
    result = span([str(i) for i in range(count)], 0.8, torch.Generator().manual_seed(seed))
    places = [i for i, unit in enumerate(result) if unit == MASK]
    assert places == list(range(places[0], places[-1] + 1))


@pytest.mark.parametrize("function", [omit, span])
def test_random_places_reach_everywhere(function):
    words = [str(i) for i in range(10)]
    drawn = [function(words, 0.3, torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert {i for result in drawn for i, unit in enumerate(result) if unit == MASK} == set(range(10))
    assert {result.count(MASK) for result in drawn} == {1, 2, 3}


@pytest.mark.parametrize("function", [omit, span])
def test_rate_zero_changes_nothing(function):
    assert function(["a", "b"], 0.0, torch.Generator().manual_seed(0)) == ["a", "b"]


def test_chinese_is_masked_by_character():
    units = split_units("今天 天气很好", "char")
    assert units == list("今天天气很好")
    assert omit_last(units, 0.15, 0.15) == [*"今天天气很", MASK]


def test_words_are_separated_by_any_blanks():
    assert split_units("  im\tnorden   regen ", "word") == ["im", "norden", "regen"]
    assert split_units(" ", "word") == split_units("", "char") == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: omit_last(["a"], 0.15, 0.5), "u=0.5; expected the draw itself"),
        (lambda: omit_last(["a"], 1.5, 0.5), "rate=1.5"),
        (lambda: omit(["a"], -0.1, torch.Generator()), "rate=-0.1"),
        (lambda: corrupt(["a"], "omit_first", 0.1, None), "'omit_first'; known: omit_last, omit, span"),
        (lambda: corrupt(["a"], "span", 2.0, None), "rate=2.0"),
        (lambda: split_units("a", "words"), "'words'; known: word, char"),
    ],
)
def test_bad_options(call, message):
    with pytest.raises(UserError, match=message):
        call()
