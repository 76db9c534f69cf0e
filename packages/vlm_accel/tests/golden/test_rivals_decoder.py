"""Rival methods inside the decoder against float64 references; limits and properties."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from torch._subclasses.fake_tensor import FakeTensorMode
from vlm_accel.methods import create
from vlm_accel.methods.base import Tokens
from vlm_accel.methods.pact import importance
from vlm_accel.methods.sparsevlm import clusters, raters, split
from vlm_accel.ops.cluster import cosine_distance, density_centres, dpc_knn

_spec = importlib.util.spec_from_file_location(
    "vlm_rivals_decoder_reference", Path(__file__).with_name("_rivals_reference.py")
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

D, WIDTH = 12, 5


def _np(tensor):
    return tensor.numpy()


def _tokens(seed, spans=2, count=24, keys=True, sizes=None, **options):
    draw = np.random.default_rng(seed)
    return Tokens(
        x=torch.from_numpy(draw.normal(size=(spans, count, D))),
        stage="llm",
        layer=3,
        scores=torch.from_numpy(draw.dirichlet(np.ones(count), spans)),
        sizes=sizes,
        keys=torch.from_numpy(draw.normal(size=(spans, count, 2, WIDTH)) + 1.0) if keys else None,
        **options,
    )


@pytest.mark.parametrize(("rows", "count"), [(20, 3), (8, 1), (5, 5), (40, 6)])
def test_dpc_knn(rows, count):
    x = np.random.default_rng(rows).normal(size=(2, rows, 6))
    centres, owner = dpc_knn(torch.from_numpy(x), count)
    for i in range(2):
        expected, nearest = reference.dpc_knn(x[i], count)
        assert centres[i].tolist() == expected
        assert [expected[o] for o in owner[i].tolist()] == nearest


def test_dpc_knn_with_equal_points():
    """Equal densities fall back on the index; each centre is its own."""
    centres, owner = dpc_knn(torch.ones(1, 6, 4), 3)
    assert centres[0].tolist() == [0, 1, 2]
    assert owner[0][centres[0]].tolist() == [0, 1, 2]


@pytest.mark.parametrize("keep", [1, 2, 5, 12, 20, 23])
def test_sparsevlm_reduce(keep):
    tokens = _tokens(keep, trace=True, sizes=torch.ones(2, 24))
    reduced = create("sparsevlm").reduce(tokens, keep)
    stay, _ = split(24, keep)
    for i in range(2):
        x = _np(tokens.x[i])
        rows, kept = reference.sparsevlm(x, _np(tokens.scores[i]), stay)
        if len(kept) != keep:
            continue  # fewer than the clusters of nearly all tokens: our completion, see test_sparsevlm_counts
        assert reduced.kept[i].tolist() == kept
        np.testing.assert_allclose(_np(reduced.x[i]), rows, atol=1e-9)
        np.testing.assert_allclose(_np(reduced.weight[i].double()) @ x, rows, atol=1e-6)
    pooled = min(24 - stay, int(0.3 * (24 - stay)) + 1)
    assert reduced.sizes.sum(1).tolist() == [stay + pooled] * 2
    assert reduced.x.shape[1] == keep


def test_sparsevlm_counts():
    """The published settings at 576 tokens: those that stay, and the clusters on top."""
    steps = create("sparsevlm").schedule()[0].steps(32)
    assert [step.layer for step in steps] == [3, 7, 16]
    left, counts = 576, []
    for step in steps:
        counts.append(split(left, step.count(left)))
        left = step.count(left)
    assert counts == [(300, 9), (200, 4), (110, 3)]
    for tokens in (2, 30, 577):
        for keep in range(1, tokens):
            stay, made = split(tokens, keep)
            assert stay + made == keep
            assert made <= int(0.3 * (tokens - stay)) + 1
            if stay > 1:
                assert made == clusters(tokens - stay)


def test_sparsevlm_raters():
    draw = np.random.default_rng(3)
    embeds = draw.normal(size=(2, 14, 8))
    image = np.zeros((2, 14), dtype=bool)
    image[:, 3:7] = True
    image[1, 8:10] = True
    valid = np.ones((2, 14), dtype=bool)
    valid[0, :2] = False
    got = raters(*(torch.from_numpy(a) for a in (embeds, image, valid)))
    for i in range(2):
        expected = reference.raters(embeds[i], image[i], valid[i])
        assert got[i].nonzero().flatten().tolist() == expected


def test_sparsevlm_raters_without_text_after_the_image():
    embeds = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    image = torch.tensor([[False, False, True, True, True]])
    assert raters(embeds, image, torch.ones_like(image)).tolist() == [[False] * 4 + [True]]
    image = torch.tensor([[False, True, True, True, False]])
    assert raters(embeds, image, torch.ones_like(image)).tolist() == [[False] * 4 + [True]]


@pytest.mark.parametrize("count", [1, 3, 8, 20, 23])
@pytest.mark.parametrize("cutoff", [0.05, 0.21, 0.8])
def test_pact_reduce(count, cutoff):
    tokens = _tokens(count, trace=True)
    reduced = create("pact", cutoff=cutoff).reduce(tokens, count)
    for i in range(2):
        x, keys = _np(tokens.x[i]), _np(tokens.keys[i].flatten(1))
        rows, kept, sizes = reference.pact(x, keys, _np(tokens.scores[i]), count, cutoff=cutoff)
        assert reduced.kept[i].tolist() == kept
        np.testing.assert_allclose(_np(reduced.x[i]), rows, atol=1e-9)
        assert reduced.sizes[i].tolist() == sizes
        np.testing.assert_allclose(_np(reduced.weight[i].double()) @ x, rows, atol=1e-6)


def test_pact_importance():
    draw = np.random.default_rng(8)
    queries, keys = draw.normal(size=(2, 4, 11, 6)), draw.normal(size=(2, 2, 11, 6))
    x = draw.normal(size=(2, 11, 9))
    image = np.zeros((2, 11), dtype=bool)
    image[0, 2:8] = image[1, 1:5] = True
    got = importance(*(torch.from_numpy(a) for a in (queries, keys, x, image)))
    for i in range(2):
        expected = reference.pact_importance(queries[i], keys[i], x[i], image[i])
        np.testing.assert_allclose(_np(got[i]), expected, atol=1e-12)


def test_pact_centres_of_tight_clusters():
    """Three directions, far apart: three centres, each token in its own cluster, pruned ones too."""
    draw = torch.Generator().manual_seed(1)
    directions = torch.eye(3)[torch.arange(30) % 3]
    keys = directions + 0.02 * torch.randn(30, 3, generator=draw)
    tokens = Tokens(
        x=directions[None].double() * 5,
        stage="llm",
        layer=4,
        scores=torch.rand(1, 30, generator=draw),
        keys=keys[None, :, None].double(),
        trace=True,
    )
    reduced = create("pact").reduce(tokens, 3)
    assert sorted(reduced.kept[0].remainder(3).tolist()) == [0, 1, 2]
    assert reduced.sizes.tolist() == [[10, 10, 10]]
    torch.testing.assert_close(reduced.x[0], tokens.x[0][reduced.kept[0]])


def test_density_centres_go_on_when_all_are_near():
    """One tight cluster: after the densest token come those farthest from what is chosen."""
    angle = torch.tensor([0.0, 0.01, 0.02, 0.3])
    x = torch.stack([angle.cos(), angle.sin()], -1)[None]
    assert density_centres(cosine_distance(x, x), 2, cutoff=0.5).tolist() == [[2, 3]]


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop"])
def test_fastv_and_pyramiddrop_drop(name):
    tokens = _tokens(5)
    left, expected = create(name).reduce(tokens, 9), create("drop").reduce(tokens, 9)
    assert torch.equal(left.kept, expected.kept)
    assert torch.equal(left.x, expected.x)
    for i in range(2):
        _same_rows(left, i, reference.dropped(_np(tokens.x[i]), reference.ranked(_np(tokens.scores[i]))[:9]))


def _same_rows(reduced, i, expected):
    assert reduced.kept[i].tolist() == expected[1]
    np.testing.assert_array_equal(_np(reduced.x[i]), expected[0])


def test_published_schedules():
    """FastV: half before layer 2. PyramidDrop: truncated halves at the quarters of any depth."""
    (step,) = create("fastv").schedule()
    assert (step.layer, step.count(576), step.count(577)) == (2, 288, 289)
    assert create("fastv", layer=3, ratio=0.25).schedule()[0].count(576) == 144
    for depth, layers in ((32, [8, 16, 24]), (28, [7, 14, 21]), (40, [10, 20, 30]), (6, [2, 3, 4])):
        steps = create("pyramiddrop").schedule()[0].steps(depth)
        assert [step.layer for step in steps] == layers
        for tokens in (576, 577, 1023):
            left = tokens
            for number, step in enumerate(steps, 1):
                left = step.count(left)
                assert left == int(tokens * 0.5**number)
    assert create("pact").schedule()[0].layer == 4


def test_pyramiddrop_counts_differ_from_drop_by_rounding_only():
    """Three halvings: int() here, half to even of what goes there."""
    from vlm_accel.schedule import Step, resolve

    steps = create("pyramiddrop").schedule()[0].steps(32)
    halvings = [Step("llm", step.layer, ratio=0.5) for step in steps]
    assert resolve(steps, 576) == resolve(halvings, 576) == [288, 144, 72]
    assert resolve(steps, 575) == [287, 143, 71]
    assert resolve(halvings, 575) == [287, 143, 71]
    assert resolve(steps, 577) == [288, 144, 72]
    assert resolve(halvings, 577) == [289, 145, 73]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fastv", {"layer": 0}), ("fastv", {"ratio": 2.0}), ("pyramiddrop", {"layers": (4, 4)}),
        ("pyramiddrop", {"layers": (0, 4)}), ("sparsevlm", {"retained": 100}), ("sparsevlm", {"recycle": 2.0}),
        ("sparsevlm", {"layers": (2, 4)}), ("pact", {"stay": 0.0}), ("pact", {"layer": 0}),
        ("visionzip", {"dominant": 0}), ("vispruner", {"step": 0}), ("hired", {"voters": 0.0}),
        ("prumerge", {"neighbours": -1}),
    ],
)  # fmt: skip
def test_bad_options_are_refused(name, options):
    with pytest.raises(UserError):
        create(name, **options)


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(["fastv", "pyramiddrop", "sparsevlm", "pact"]),
    count=st.integers(2, 40),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 1000),
)
def test_decoder_methods_keep_what_they_promise(name, count, share, seed):
    keep = min(count - 1, max(1, round(share * count)))
    tokens = _tokens(seed, count=count, sizes=torch.ones(2, count))
    tokens.x = tokens.x.to(torch.bfloat16)
    reduced = create(name).reduce(tokens, keep)
    assert reduced.x.shape == (2, keep, D)
    assert reduced.x.dtype == torch.bfloat16
    assert torch.isfinite(reduced.x).all()
    assert (reduced.kept.diff(dim=1) > 0).all()
    if reduced.sizes is not None:
        assert (reduced.sizes >= 1).all()
        assert (reduced.sizes.sum(1) <= count).all()


# ---- no host synchronisation


def _fake(*shape):
    return torch.empty(*shape, device="cuda")


def test_no_value_is_looked_at_on_the_host():
    """On tensors that only have shapes, as on a GPU: whatever reads a value back raises."""
    with FakeTensorMode(), torch.no_grad():
        tokens = Tokens(_fake(2, 40, 16), "llm", 3, scores=_fake(2, 40), sizes=_fake(2, 40), keys=_fake(2, 40, 2, 8))
        for name in ("fastv", "pyramiddrop", "sparsevlm", "pact"):
            assert create(name).reduce(tokens, 17).x.shape == (2, 17, 16)
        image = _fake(2, 40).bool()
        assert raters(tokens.x, image, ~image).shape == (2, 40)
        assert importance(_fake(2, 4, 40, 8), _fake(2, 2, 40, 8), tokens.x, image).shape == (2, 40)
