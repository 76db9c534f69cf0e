"""KVBudget: counts, text form, errors."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from vlm_accel.budget import KVBudget


def test_uniform_is_the_number_itself():
    assert KVBudget.uniform(512).entries([1000, 100, 512]) == [512, 512, 512]


def test_ratio_follows_each_layer():
    budget = KVBudget.ratio(0.5, sink=2, recent=4, window=4)
    assert budget.entries([100, 60, 12, 6]) == [50, 30, 10, 6]
    assert KVBudget.ratio(0.5).entries([1000, 100, 50]) == [500, 68, 50]  # at least 4 + 32 + 32


def test_pyramid_is_the_published_line():
    """The example of LightVLM 5: n = 1000, share .2, 10 layers, w = 8."""
    budget = KVBudget.pyramid(0.2, sink=0, recent=8, window=8)
    entries = budget.entries([1000] * 10)
    assert entries == [390, 348, 306, 263, 221, 179, 137, 94, 52, 10]
    assert sum(entries) == 10 * 200


def test_pyramid_where_the_line_meets_the_prefill():
    """hi >= n - w: hi = n - w, lo = 2 (cap - w) - hi, still the same mean."""
    entries = KVBudget.pyramid(0.7, sink=0, recent=8, window=8).entries([1000] * 5)
    assert entries == [992, 846, 700, 554, 408]


def test_pyramid_falls_back_to_a_flat_share():
    assert KVBudget.pyramid(0.1, sink=0, recent=0, window=32).entries([100] * 4) == [10] * 4
    assert KVBudget.pyramid(0.5, sink=0, recent=0, window=1).entries([100]) == [50]


def test_pyramid_keeps_what_is_protected_and_never_more_than_there_is():
    entries = KVBudget.pyramid(0.2, sink=4, recent=32, window=8).entries([1000] * 8 + [40, 20])
    assert entries[-3:] == [94, 40, 20]
    assert KVBudget.pyramid(0.2, sink=4, recent=32, window=8).entries([1000] * 10)[-1] == 36


@given(
    kind=st.sampled_from(["ratio", "ada", "pyramid"]),
    share=st.floats(0.01, 1.0),
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    window=st.integers(1, 64),
)
@settings(deadline=None, max_examples=60)
def test_shares_stay_within_their_layer(kind, share, lengths, window):
    budget = KVBudget(kind, share, sink=2, recent=3, window=window)
    lengths = sorted(lengths, reverse=True)
    entries = budget.entries(lengths)
    assert len(entries) == len(lengths)
    assert all(min(n, 5) <= b <= n for b, n in zip(entries, lengths, strict=True))


@pytest.mark.parametrize(
    "budget",
    [
        KVBudget.ratio(0.5),
        KVBudget.uniform(512, interval=64),
        KVBudget.ada(0.25, pool=5, scope="image"),
        KVBudget.pyramid(0.3, per_head=False, sink=0, recent=8),
    ],
)
def test_text_and_back(budget):
    assert KVBudget.parse(budget.text()) == budget


def test_text_is_short():
    assert KVBudget.ratio(0.5).text() == "ratio:0.5"
    assert KVBudget.parse(" ratio:0.5, recent = 16 ,per_head=False").text() == "ratio:0.5,recent=16,per_head=false"


@pytest.mark.parametrize(
    "text",
    [
        "half", "ratio", "ratio:0", "ratio:1.5", "ratio:nan", "uniform:0", "uniform:40.5", "uniform:inf", "uniform:20",
        "ratio:0.5,recent", "ratio:0.5,recent=few", "ratio:0.5,colour=red", "ratio:0.5,scope=video", "ratio:0.5,pool=4",
        "ratio:0.5,window=0", "ratio:0.5,sink=-1", "ratio:0.5,per_head=perhaps", "ratio:0.5,kind=ada", "",
    ],
)  # fmt: skip
def test_bad_text_is_one_line(text):
    with pytest.raises(UserError) as error:
        KVBudget.parse(text)
    assert "\n" not in str(error.value)
    assert "KV" in str(error.value)
