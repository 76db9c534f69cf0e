"""Steps, pyramids, tapers: counts of the specifications, expansion onto a model, errors in one line."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from vlm_accel import Step, pyramid, resolve
from vlm_accel.schedule import Pyramid, Taper, counts_per_layer, expand

FEW = settings(max_examples=50, deadline=None)


def vision(layers, **amount):
    return [Step("vision", layer, **amount) for layer in layers]


@pytest.mark.parametrize(
    ("steps", "tokens", "group", "counts"),
    [
        (vision((5, 6, 7, 8), drop=92), 729, 1, [637, 545, 453, 361]),
        (vision((5, 6, 7, 8), ratio=0.85), 1296, 1, [1102, 937, 796, 677]),
        (vision((5, 6, 7, 8), ratio=0.85), 1296, 4, [1100, 932, 792, 672]),
        ([Step("llm", k, ratio=0.9) for k in (19, 21, 23, 25)], 361, 1, [325, 293, 264, 238]),
        ([Step("llm", k, ratio=0.5) for k in (2, 4, 8)], 576, 1, [288, 144, 72]),
        (vision((1,), ratio=0.5), 5, 1, [3]),
        (vision((1,), ratio=0.5), 7, 1, [3]),
        (vision((1,), ratio=0.5), 9, 1, [5]),
        (vision((1,), keep=900), 729, 1, [729]),
        (vision((1,), drop=900), 729, 1, [1]),
        (vision((1,), drop=900), 729, 4, [4]),
        (vision((1,), drop_ratio=0.16), 1024, 4, [864]),  # 163 removed, of which 160 in whole cells
        ([Step("llm", 8, ratio=0.5, truncate=True)], 577, 1, [288]),
        ([Step("llm", 8, ratio=0.29, truncate=True)], 100, 1, [29]),  # 100 * .29 is 28.999... in floats
    ],
)
def test_counts_of_the_specifications(steps, tokens, group, counts):
    assert resolve(steps, tokens, group) == counts


def test_groups_are_the_encoders():
    """Cells bind vision steps; the decoder counts tokens one by one."""
    steps = [Step("vision", 3, ratio=0.5), Step("llm", 2, ratio=0.5)]
    assert resolve(steps, 36, group=4) == [16, 8]
    assert resolve([Step("llm", 2, ratio=0.5)], 9, group=4) == [5]


@FEW
@given(
    st.integers(1, 5000),
    st.sampled_from([1, 4, 9]),
    st.lists(
        st.one_of(
            st.builds(lambda v: {"ratio": v}, st.floats(0.001, 1.0)),
            st.builds(lambda v: {"drop_ratio": v}, st.floats(0.0, 0.999)),
            st.builds(lambda v: {"keep": v}, st.integers(1, 6000)),
            st.builds(lambda v: {"drop": v}, st.integers(0, 6000)),
        ),
        max_size=5,
    ),
)
def test_counts_never_rise_and_never_end(tokens, group, amounts):
    tokens *= group
    counts = resolve([Step("vision", k, **amount) for k, amount in enumerate(amounts)], tokens, group)
    for before, after in itertools.pairwise([tokens, *counts]):
        assert group <= after <= before
        assert after % group == 0


@FEW
@given(st.integers(1, 5000), st.sampled_from([1, 4]))
def test_keeping_all_is_no_step(tokens, group):
    tokens *= group
    for amount in ({"ratio": 1.0}, {"drop": 0}, {"drop_ratio": 0.0}, {"keep": tokens}):
        assert Step("vision", 0, **amount).count(tokens, group) == tokens


def test_pyramids_of_both_targets():
    for target, counts in ((0.35, [722, 509, 359]), (0.03, [318, 99, 31])):
        _, steps = expand(pyramid(target), 0, 28)
        assert [step.layer for step in steps] == [2, 9, 18]
        assert resolve(steps, 1024) == counts
    assert [step.layer for step in Pyramid(0.35).steps(32)] == [2, 10, 21]
    assert [step.layer for step in Pyramid(0.35).steps(48)] == [2, 16, 32]


def test_mean_pyramid():
    """Mean share .35 over 28 layers with steps at 2, 9, 18.

    LightVLM 8 has r = .5327: the least r whose rounded counts of 1024 tokens reach .35. Ours solves the equation for
    shares, before anyone knows the tokens: .5329, and the same counts.
    """
    (one,) = pyramid(0.35, [2, 9, 18], meaning="mean")
    steps = one.steps(28)
    assert abs(steps[0].ratio - 0.5327) < 3e-4
    assert resolve(steps, 1024) == [546, 291, 155]
    shares = [steps[0].ratio ** sum(layer >= at for at in (2, 9, 18)) for layer in range(28)]
    assert abs(sum(shares) / 28 - 0.35) < 1e-12


def test_pyramids_of_own_layers_and_ratios():
    (one,) = pyramid(0.5, [1, 4], ratios=[0.5, 0.25])
    assert [(step.layer, step.ratio) for step in one.steps(6)] == [(1, 0.5), (4, 0.25)]
    assert Pyramid(0.3).steps(3) == [Step("llm", 1, ratio=0.3**0.5), Step("llm", 2, ratio=0.3**0.5)]
    assert [step.layer for step in Pyramid(0.3).steps(28, first=3)] == [3, 9, 18]
    scaled = Pyramid(0.125, (8, 16, 24), of=32)
    assert [step.layer for step in scaled.steps(28)] == [7, 14, 21]
    assert [step.layer for step in scaled.steps(4)] == [1, 2, 3]


def test_tapers():
    steps, _ = expand([Taper(0.5)], 24, 0)
    assert [step.layer for step in steps] == [6, 7, 8, 9]
    assert resolve(steps, 1000)[-1] in range(498, 503)
    steps, _ = expand([Taper(0.5)], 32, 0, allowed=[7, 15, 23, 31])
    assert [step.layer for step in steps] == [15, 23, 31]
    assert resolve(steps, 1000)[-1] in range(498, 503)
    assert [step.layer for step in Taper(0.5).expand(2)] == [0, 1]
    assert [step.layer for step in Taper(0.5).expand(8, allowed=[1])] == [1]


def test_parts_combine_in_any_order():
    steps = [*pyramid(0.35), Step("vision", 8, drop=9), Step("vision", 5, ratio=0.5)]
    found, llm = expand(steps, 24, 28)
    assert [step.layer for step in found] == [5, 8]
    assert [step.layer for step in llm] == [2, 9, 18]
    assert expand(pyramid(0.35), 24, 0) == ([], [])


def test_tokens_that_enter_each_layer():
    """An LLM step acts before its layer, a vision step after its block's attention."""
    steps = [Step("llm", 2, ratio=0.5), Step("llm", 4, ratio=0.5)]
    assert counts_per_layer(steps, 16, 6) == [16, 16, 8, 8, 4, 4]
    assert counts_per_layer(vision((1, 2), drop=5), 16, 4) == [16, 16, 11, 6]
    assert counts_per_layer(vision((1,), ratio=0.5), 20, 3, group=4) == [20, 20, 8]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Step("audio", 1, keep=2), "use 'vision' or 'llm'"),
        (lambda: Step("vision", -1, keep=2), "whole number from 0"),
        (lambda: Step("vision", 1.5, keep=2), "whole number from 0"),
        (lambda: Step("llm", 0, keep=2), "layer 1 or later"),
        (lambda: Step("vision", 1), "exactly one"),
        (lambda: Step("vision", 1, keep=2, drop=2), "exactly one"),
        (lambda: Step("vision", 1, keep=0), "at least one token"),
        (lambda: Step("vision", 1, keep=2.5), "whole number of tokens"),
        (lambda: Step("vision", 1, drop=True), "whole number of tokens"),
        (lambda: Step("vision", 1, ratio="half"), "expected a share"),
        (lambda: Step("vision", 1, ratio=1.4), r"\(0, 1\]"),
        (lambda: Step("vision", 1, ratio=0), r"\(0, 1\]"),
        (lambda: Step("vision", 1, ratio=float("nan")), r"\(0, 1\]"),
        (lambda: Step("vision", 1, drop=-1), "0 or more"),
        (lambda: Step("vision", 1, drop_ratio=1.0), r"\[0, 1\)"),
        (lambda: pyramid(0), "target=0"),
        (lambda: pyramid(1.5), "target=1.5"),
        (lambda: pyramid(0.5, [3, 2]), "ascending"),
        (lambda: pyramid(0.5, [0, 2]), "layer 0"),
        (lambda: pyramid(0.5, meaning="median"), "'final' or 'mean'"),
        (lambda: pyramid(0.5, ratios=[0.5]), "layers of the same length"),
        (lambda: pyramid(0.5, [2], ratios=[0.0]), "shares in"),
        (lambda: Taper(0.0), "ratio=0.0"),
        (lambda: expand(pyramid(0.5, [9]), 0, 8), "beyond the model's 8"),
        (lambda: expand(pyramid(0.05, [5], meaning="mean"), 0, 8), "cannot be reached"),
        (lambda: expand([Step("llm", 8, keep=2)], 0, 8), "only layers 0 to 7"),
        (lambda: expand([Step("vision", 1, keep=2)], 0, 8), "no vision part"),
        (lambda: expand([Step("llm", 2, keep=2)], 8, 0), "no llm part"),
        (lambda: expand([Step("llm", 2, keep=2), *pyramid(0.5)], 0, 28), "two llm steps"),
        (lambda: expand([Step("vision", 2, keep=2)], 8, 0, allowed=[3, 7]), r"at \[3, 7\] only"),
    ],
)
def test_bad_schedules_are_one_line(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
