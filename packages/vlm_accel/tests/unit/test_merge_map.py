"""Merge maps: composition of steps, weights of source patches, cells, files."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from vlm_accel import ops
from vlm_accel.merge_map import CSR, MergeMap, MergeStep, csr

FEW = settings(max_examples=20, deadline=None)


def make(seed, grid=(2, 3, 4), group=1, rules=("recycle", "assign", "rank1"), keeps=(15, 9, 4)):
    """A map of random steps, and the tokens before and after each."""
    draw = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1] * grid[2] // group
    x = torch.randn(1, n, 5, generator=draw, dtype=torch.float64)
    made, states = MergeMap(grid, 1, group), [x[0].numpy()]
    for layer, (rule, keep) in enumerate(zip(rules, keeps, strict=True)):
        scores = torch.rand(1, x.shape[1], generator=draw)
        reduced = getattr(ops, rule)(x, scores, keep)
        made.steps.append(MergeStep.of("vision", layer, reduced, 0, scores[0]))
        x = reduced.x
        states.append(x[0].numpy())
    return made, states


@FEW
@given(st.integers(0, 10_000), st.permutations(["recycle", "assign", "rank1", "drop"]))
def test_owners_and_weights_are_compositions(seed, rules):
    made, states = make(seed, rules=rules, keeps=(15, 9, 6, 4))
    owner, place = np.arange(24), np.arange(24)
    for step, one in enumerate(made.steps):
        owner = np.array([-1 if o < 0 else one.assign[o] for o in owner])
        place = place[one.kept]
        np.testing.assert_array_equal(made.owner(step), owner)
        np.testing.assert_array_equal(made.positions(step), place)
        np.testing.assert_array_equal(np.flatnonzero(made.survivors(step)), place)
        weights = made.source_weights(step)
        np.testing.assert_allclose(weights.row_sums(), 1, atol=1e-6)
        np.testing.assert_allclose(weights.dense() @ states[0], states[step + 1], atol=1e-5)
        np.testing.assert_allclose(weights.column_sums(), weights.dense().sum(0), atol=1e-12)
        np.testing.assert_array_equal(made.sizes(step), [(owner == row).sum() for row in range(one.n_out)])
    assert np.array_equal(made.owner(), made.owner(3))
    assert np.array_equal(np.asarray(made.source_weights()), made.source_weights(3).dense())


def test_nothing_done_is_the_identity():
    made = MergeMap((1, 2, 3))
    assert made.owner().tolist() == list(range(6))
    assert made.survivors().all()
    assert np.array_equal(made.source_weights().dense(), np.eye(6))
    assert made.sizes().tolist() == [1] * 6


def test_cells_are_expanded_to_their_patches():
    """A grid of 4 x 4 patches in cells of 2 x 2: of the four cells, the two on the diagonal stay."""
    step = MergeStep("vision", 0, 4, 2, np.array([0, 3]), np.array([0, -1, 0, 1]))
    made = MergeMap((1, 4, 4), group=4, steps=[step])
    assert made.owner().reshape(4, 4).tolist() == [[0, 0, -1, -1], [0, 0, -1, -1], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert (
        made.survivors().reshape(4, 4).tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
    )
    weights = made.source_weights().dense()
    assert weights.shape == (2, 16)
    assert np.flatnonzero(weights[1]).tolist() == [10, 11, 14, 15]
    assert weights.sum(1).tolist() == [1.0, 1.0]
    assert made.sizes().tolist() == [8, 4]


def test_cells_of_two_tiles_come_tile_after_tile():
    made = MergeMap((2, 2, 4), group=4)
    assert made.owner().reshape(2, 2, 4).tolist() == [[[0, 0, 1, 1]] * 2, [[2, 2, 3, 3]] * 2]


def test_a_newline_is_no_patch():
    """Splicing: rows 0, 1, newline, 2; then the newline and row 1 go."""
    splice = MergeStep("splice", 0, 3, 4, np.array([0, 1, -1, 2]), np.array([0, 1, 3]))
    llm = MergeStep("llm", 2, 4, 2, np.array([0, 3]), np.array([0, 0, -1, 1]))
    made = MergeMap((1, 1, 3), steps=[splice, llm])
    assert made.positions(0).tolist() == [0, 1, -1, 2]
    assert made.survivors(0).all()
    assert made.source_weights(0).row_sums().tolist() == [1, 1, 0, 1]
    assert made.owner().tolist() == [0, 0, 1]
    assert made.survivors().tolist() == [True, False, True]


def test_all_gone():
    x = torch.empty(1, 4, 2)
    from vlm_accel.methods import create
    from vlm_accel.methods.base import Tokens

    reduced = create("text_only").reduce(Tokens(x, "llm", 2, trace=True), 0)
    made = MergeMap((1, 2, 2), steps=[MergeStep.of("llm", 2, reduced)])
    assert made.owner().tolist() == [-1] * 4
    assert not made.survivors().any()
    assert made.source_weights().shape == (0, 4)
    assert made.sizes().tolist() == []


@FEW
@given(st.integers(0, 10_000))
def test_products_of_sparse_matrices(seed):
    rng = np.random.default_rng(seed)
    shapes = rng.integers(1, 7, size=3)
    left = rng.normal(size=shapes[:2]) * (rng.random(shapes[:2]) < 0.5)
    right = rng.normal(size=shapes[1:]) * (rng.random(shapes[1:]) < 0.5)

    def sparse(dense):
        indptr, indices, data = csr(dense)
        return CSR(indptr, indices, data.astype(float), dense.shape[1])

    np.testing.assert_allclose((sparse(left) @ sparse(right)).dense(), left @ right, atol=1e-6)
    np.testing.assert_allclose(sparse(left).dense(), left, atol=1e-6)


def test_bfloat16_weights_and_scores_become_float32():
    indptr, indices, data = csr(torch.tensor([[0.0, 0.5], [1.0, 0.0]], dtype=torch.bfloat16))
    assert (indptr.tolist(), indices.tolist(), data.tolist()) == ([0, 1, 2], [1, 0], [0.5, 1.0])
    assert data.dtype == np.float32


@FEW
@given(st.integers(0, 10_000), st.sampled_from([1, 4]))
def test_files_bring_everything_back(tmp_path_factory, seed, group):
    grid, keeps = ((2, 3, 4), (15, 9, 4)) if group == 1 else ((2, 4, 4), (6, 4, 3))
    made, _ = make(seed, grid, group, ("recycle", "drop", "rank1"), keeps)
    path = made.to_npz(tmp_path_factory.mktemp("map") / "map.npz")
    back = MergeMap.from_npz(path)
    assert (back.grid, back.prefix, back.group) == (grid, 1, group)
    for one, other in zip(made.steps, back.steps, strict=True):
        assert (one.stage, one.layer, one.n_in, one.n_out) == (other.stage, other.layer, other.n_in, other.n_out)
        for name in ("kept", "assign", "score"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert (one.weight is None) == (other.weight is None)
        for part, again in zip(one.weight or (), other.weight or (), strict=True):
            np.testing.assert_array_equal(part, again)
    assert np.array_equal(np.asarray(made.source_weights()), np.asarray(back.source_weights()))


def _broken(path, **changes):
    """A file of one step with some of its arrays replaced."""
    head = {"stage": "vision", "layer": 0, "n_in": 4, "n_out": 2}
    header = {"schema": 1, "grid": [1, 2, 2], "prefix": 0, "group": 1, "steps": [head], **changes.pop("header", {})}
    arrays = {"0_kept": np.array([0, 3]), "0_assign": np.array([0, -1, -1, 1]), **changes}
    np.savez(path, header=np.array(json.dumps(header)), **arrays)
    return path


def test_a_good_file_of_that_form_is_read(tmp_path):
    assert MergeMap.from_npz(_broken(tmp_path / "m.npz")).owner().tolist() == [0, -1, -1, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"0_kept": np.array([0, 4])},
        {"0_assign": np.array([0, -1, -1, 2])},
        {"0_assign": np.array([0, -2, -1, 1])},
        {"0_kept": np.array([0])},
        {"0_indptr": np.array([0, 1, 9]), "0_indices": np.array([0, 3]), "0_data": np.ones(2)},
        {"0_indptr": np.array([0, 1, 2]), "0_indices": np.array([0, 7]), "0_data": np.ones(2)},
        {"header": {"grid": [1, 2, 3]}},
        {"header": {"grid": [10**5, 10**5, 10**5]}},
        {"header": {"schema": 99}},
        {"header": {"group": 4}},
        {"header": {"steps": [{"stage": "vision"}]}},
        {"0_kept": np.array([{}, []], dtype=object)},
    ],
)
def test_broken_files_are_refused(tmp_path, changes):
    with pytest.raises(UserError, match="no merge map"):
        MergeMap.from_npz(_broken(tmp_path / "m.npz", **dict(changes)))


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="no merge map at"):
        MergeMap.from_npz(tmp_path / "none.npz")
    other = tmp_path / "other.npz"
    other.write_bytes(b"not a zip archive")
    with pytest.raises(UserError, match="is no merge map"):
        MergeMap.from_npz(other)
    np.savez(tmp_path / "else.npz", a=np.ones(2))
    with pytest.raises(UserError, match="is no merge map"):
        MergeMap.from_npz(tmp_path / "else.npz")


def test_steps_that_do_not_fit_are_errors():
    step = MergeStep("vision", 0, 5, 2, np.array([0, 3]), np.zeros(5, dtype=int))
    with pytest.raises(ValueError, match="takes 5 rows"):
        MergeMap((1, 2, 2), steps=[step]).owner()
    with pytest.raises(IndexError):
        MergeMap((1, 2, 2)).owner(0)
    with pytest.raises(ValueError, match="trace=True"):
        MergeStep.of("vision", 0, ops.drop(torch.zeros(1, 3, 2), torch.zeros(1, 3), 2, trace=False))
