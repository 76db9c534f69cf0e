"""Merge rules against an independent float64 NumPy reference, 1e-12, and against values worked out by hand."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vlm_accel import ops

_spec = importlib.util.spec_from_file_location(
    "vlm_merging_reference", Path(__file__).with_name("_merging_reference.py")
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

FEW = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 100_000)


@st.composite
def worlds(draw, least=1):
    """Tokens (S, N, D), scores with ties (S, N), sizes, keep in [least, N - 1]."""
    rng = np.random.default_rng(draw(SEEDS))
    n = draw(st.integers(least + 1, 24))
    s, d = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    scores = rng.random((s, n))
    if draw(st.booleans()):
        scores = np.round(scores * 3) / 3  # many equal ones, some zero
    return {
        "x": rng.normal(size=(s, n, d)),
        "scores": scores,
        "sizes": rng.integers(1, 5, size=(s, n)).astype(float),
        "keep": draw(st.integers(least, n - 1)),
        "rng": rng,
    }


def agree(found, expected):
    """Tokens, rows, owners, weights of a batch against the samples' references."""
    for s, (tokens, kept, assign, matrix) in enumerate(expected):
        np.testing.assert_allclose(found.x[s], tokens, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(found.kept[s], kept)
        np.testing.assert_array_equal(found.assign[s], assign)
        if found.weight is not None:
            np.testing.assert_allclose(found.weight[s], matrix, rtol=0, atol=1e-12)


def tensors(world, *names):
    return [torch.from_numpy(world[name]) for name in names]


def each(world):
    return range(len(world["x"]))


@FEW
@given(worlds(), st.sampled_from(["rank_desc", "rank_asc", "uniform", "score"]))
def test_rank1(world, weights):
    if weights == "score":
        world["scores"] += 0.01
    x, scores = tensors(world, "x", "scores")
    found = ops.rank1(x, scores, world["keep"], weights)
    agree(found, [reference.rank1(world["x"][s], world["scores"][s], world["keep"], weights) for s in each(world)])


def test_rank1_by_hand():
    x = torch.arange(5.0, dtype=torch.float64)[None, :, None] * torch.tensor([1.0, 10.0])
    scores = torch.tensor([[0.5, 0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)
    found = ops.rank1(x, scores, 2)  # r = 3: g = rows 1, 3, 4, 2 with weights 4, 3, 2, 1 over 10
    np.testing.assert_allclose(found.x[0, :, 0], [0.0, (4 * 1 + 3 * 3 + 2 * 4 + 1 * 2) / 10], atol=1e-12)
    assert found.kept.tolist() == [[0, 2]]
    assert found.sizes.tolist() == [[1.0, 4.0]]


def test_equal_scores_remove_the_highest_rows():
    x = torch.randn(1, 7, 3)
    for rule in (ops.rank1, ops.recycle, ops.drop, ops.assign, ops.fuse):
        assert rule(x, torch.full((1, 7), 0.25), 4).kept.tolist() == [[0, 1, 2, 3]]


@FEW
@given(worlds())
def test_drop_and_fuse(world):
    x, scores = tensors(world, "x", "scores")
    for mine, truth in ((ops.drop, reference.drop), (ops.fuse, reference.fuse)):
        found = mine(x, scores, world["keep"])
        agree(found, [truth(world["x"][s], world["scores"][s], world["keep"]) for s in each(world)])


@FEW
@given(worlds())
def test_shift(world):
    found = ops.shift(*tensors(world, "x"), world["keep"])
    agree(found, [reference.shift(world["x"][s], world["keep"]) for s in each(world)])


@FEW
@given(worlds(), st.sampled_from([0.0, 0.05, 0.3, 1.0]), st.integers(1, 6))
def test_recycle(world, pc_ratio, neighbours):
    x, scores = tensors(world, "x", "scores")
    found = ops.recycle(x, scores, world["keep"], pc_ratio, neighbours)
    truth = [
        reference.recycle(world["x"][s], world["scores"][s], world["keep"], pc_ratio, neighbours) for s in each(world)
    ]
    agree(found, truth)


def test_recycle_gives_a_token_that_two_want_alike_to_the_lower():
    # Rows 0 and 1 are the takers and equal; row 2 is the one removed token.
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    found = ops.recycle(x, torch.tensor([[0.9, 0.8, 0.1]]), 2, pc_ratio=1.0)
    np.testing.assert_allclose(found.x[0], [[0.5, 1.0], [0.5, 1.0]], atol=1e-12)
    assert found.assign.tolist() == [[0, 1, 0]]
    assert found.sizes.tolist() == [[2.0, 1.0]]


@FEW
@given(worlds(), st.sampled_from(["size", "score"]))
def test_assign(world, weights):
    world["scores"] += 0.01
    x, scores, sizes = tensors(world, "x", "scores", "sizes")
    keep = world["keep"]
    found = ops.assign(x, scores, keep, sizes, weights)
    truth = [reference.assign(world["x"][s], world["scores"][s], keep, world["sizes"][s], weights) for s in each(world)]
    agree(found, truth)
    for s in each(world):
        owned = [world["sizes"][s][truth[s][2] == out].sum() for out in range(keep)]
        np.testing.assert_allclose(found.sizes[s], owned, atol=1e-12)


def test_assign_in_pieces_is_the_same(monkeypatch):
    x, scores = torch.randn(2, 40, 5), torch.rand(2, 40)
    whole = ops.assign(x, scores, 9)
    monkeypatch.setattr("vlm_accel.ops.assignment._CHUNK", 50)
    for one, other in zip(whole, ops.assign(x, scores, 9), strict=True):
        assert one is other is None or torch.equal(one, other)


@FEW
@given(worlds(), st.integers(0, 2))
def test_tome(world, prefix):
    keys = world["rng"].normal(size=(*world["x"].shape[:2], 2, 3))
    x, sizes = tensors(world, "x", "sizes")
    found = ops.tome(x, torch.from_numpy(keys), world["keep"], sizes, prefix)
    truth = [
        reference.tome(world["x"][s], keys[s], world["keep"], world["sizes"][s], prefix) for s in each(world)
    ]  # fmt: skip
    agree(found, truth)
    np.testing.assert_allclose(found.key_bias, found.sizes.log(), rtol=1e-6)


@FEW
@given(st.integers(2, 9), st.integers(2, 9), st.integers(2, 4), SEEDS)
def test_pool_of_squares(height, width, k, seed):
    keep = -(-height // k) * -(-width // k)
    k = next(k for k in range(2, 10) if -(-height // k) * -(-width // k) == keep)
    x = np.random.default_rng(seed).normal(size=(2, height * width, 3))
    found = ops.pool(torch.from_numpy(x), keep, (height, width))
    agree(found, [reference.pool_squares(one, (height, width), k) for one in x])


@FEW
@given(worlds(), st.integers(4, 6), st.integers(4, 7), st.booleans())
def test_pool_of_what_earlier_steps_left(world, height, width, flat):
    s, n = world["x"].shape[:2]
    n = min(n, height * width - 1)  # never the whole grid, so that bins are asked for
    keep = min(world["keep"], n - 1)
    x, sizes = world["x"][:, :n], world["sizes"][:, :n]
    index = np.stack([np.sort(world["rng"].permutation(height * width)[:n]) for _ in range(s)])
    grid = None if flat else (height, width)
    found = ops.pool(torch.from_numpy(x), keep, grid, torch.from_numpy(index), torch.from_numpy(sizes))
    agree(found, [reference.pool_bins(x[i], keep, grid, index[i], sizes[i]) for i in range(s)])


def test_pool_by_hand():
    x = torch.arange(12.0)[None, :, None]
    found = ops.pool(x, 4, (3, 4))
    assert found.x.flatten().tolist() == [2.5, 4.5, 8.5, 10.5]  # the lower row of blocks has one row of cells
    assert found.assign.tolist() == [[0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3]]
    assert found.sizes.tolist() == [[4.0, 4.0, 2.0, 2.0]]


def test_pool_of_a_pool_of_a_divisible_grid_is_the_pool():
    x = torch.randn(1, 64, 3, dtype=torch.float64)
    first = ops.pool(x, 16, (8, 8))
    second = ops.pool(first.x, 4, (8, 8), first.kept, first.sizes)
    torch.testing.assert_close(second.x, ops.pool(x, 4, (8, 8)).x, rtol=0, atol=1e-12)


def test_stride():
    x = torch.arange(10.0)[None, :, None]
    assert ops.stride(x, 5).x.flatten().tolist() == [0, 2, 4, 6, 8]
    assert ops.stride(x, 3).x.flatten().tolist() == [0, 3, 6]


@pytest.mark.parametrize(
    ("seed", "stage", "layer"), [(0, "vision", 3), (1, "vision", 3), (0, "llm", 3), (0, "vision", 4)]
)
def test_draws_are_a_function_of_their_names(seed, stage, layer):
    """SplitMix64's finaliser over Python's integers."""
    from polymodal.seeding import derive

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    span = [5, 0]
    found = ops.uniform(seed, stage, layer, torch.tensor(span), 2, 7)
    base = derive(seed, "draw", stage, layer)
    for s, number in enumerate(span):
        key = mix((number * 0x9E3779B97F4A7C15 + base) % 2**64)
        expected = [(mix((key + j * 0xD1B54A32D192ED03) % 2**64) >> 40) * 2.0**-24 for j in range(7)]
        assert found[s].tolist() == expected
