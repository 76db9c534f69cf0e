"""Rival methods after the encoder and inside the decoder against float64 references; limits and properties."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from vlm_accel.methods import create
from vlm_accel.methods.base import FeatureMethod, Features
from vlm_accel.ops.cluster import cosine_distance
from vlm_accel.ops.greedy import distinct, max_min

_spec = importlib.util.spec_from_file_location("vlm_rivals_reference", Path(__file__).with_name("_rivals_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

IMAGES, N, D, H, WIDTH = 3, 30, 12, 4, 5
FEATURE_METHODS = ("visionzip", "prumerge", "prumerge_plus", "hired", "fastervlm", "vispruner", "divprune")


def _features(seed, images=IMAGES, tokens=N, blocks=(0, 5), has_cls=True, sharp=1.0, **options):
    """Random features of one encoder call in float64."""
    draw = np.random.default_rng(seed)
    made = {
        "cls_attention": {b: draw.dirichlet(np.full(tokens, 0.3), (images, H)) for b in blocks},
        "keys": {b: draw.normal(size=(images, tokens, H, WIDTH)) for b in blocks},
        "cls_query": {b: draw.normal(size=(images, H, WIDTH)) * sharp for b in blocks},
        "cls_key": {b: draw.normal(size=(images, H, WIDTH)) for b in blocks} if has_cls else {},
    }
    tensors = {name: {b: torch.from_numpy(a) for b, a in part.items()} for name, part in made.items()}
    x = torch.from_numpy(draw.normal(size=(images, tokens, D)))
    grid = (5, tokens // 5) if tokens % 5 == 0 else None
    return Features(x=x, grid=grid, has_cls=has_cls, **tensors, **options)


def _np(tensor):
    return tensor.numpy()


def _same(reduced, expected, tolerance=1e-9):
    rows, kept = expected[:2]
    assert reduced.kept[0].tolist() == kept
    np.testing.assert_allclose(_np(reduced.x[0]), rows, atol=tolerance, rtol=0)


@pytest.mark.parametrize("count", [1, 7, 20, 29])
def test_fastervlm(count):
    features = _features(1)
    method = create("fastervlm", ratio=count / N)
    assert method.count(N) == count
    for i, reduced in enumerate(method.select(features)):
        _same(reduced, reference.fastervlm(_np(features.x[i]), _np(features.cls_attention[5][i]), count))


@pytest.mark.parametrize(("dominant", "contextual"), [(10, 4), (1, 1), (20, 9), (5, 25), (12, 18)])
def test_visionzip(dominant, contextual):
    features = _features(2, trace=True)
    method = create("visionzip", dominant=dominant, contextual=contextual)
    for i, reduced in enumerate(method.select(features)):
        x = _np(features.x[i])
        attention, keys = _np(features.cls_attention[5][i]), _np(features.keys[5][i])
        if dominant + contextual == N:
            assert torch.equal(reduced.x[0], features.x[i])
            continue
        _same(reduced, reference.visionzip(x, attention, keys, dominant, contextual))
        np.testing.assert_allclose(_np(reduced.weight[0].double()) @ x, _np(reduced.x[0]), atol=1e-6)


def test_visionzip_counts():
    assert create("visionzip").split(576) == (54, 10)
    assert create("visionzip").split(60) == (54, 6)
    assert create("visionzip").split(16) == (16, 0)
    assert create("visionzip", ratio=0.2).split(576) == (97, 18)
    assert create("visionzip", ratio=0.01).split(30) == (1, 0)
    assert create("visionzip", dominant=3, contextual=0).count(30) == 3
    assert [r.x.shape[1] for r in create("visionzip", dominant=3, contextual=0).select(_features(1))] == [3, 3, 3]


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("has_cls", [False, True])
@pytest.mark.parametrize("neighbours", [4, 32])
def test_prumerge(plus, has_cls, neighbours):
    counts = set()
    for seed in range(4):
        # 31: the last row stands at the strides 10, 5 and 3, and is left out of the even distances
        features = _features(seed, tokens=31, blocks=(5,), has_cls=has_cls, sharp=2.0, trace=True)
        method = create("prumerge_plus" if plus else "prumerge", neighbours=neighbours)
        for i, reduced in enumerate(method.select(features)):
            x, keys = _np(features.x[i]), _np(features.keys[5][i])
            own = _np(features.cls_key[5][i]) if has_cls else None
            expected = reference.prumerge(x, keys, _np(features.cls_query[5][i]), own, neighbours, plus)
            _same(reduced, expected)
            np.testing.assert_allclose(_np(reduced.weight[0].double()) @ x, expected[0], atol=1e-5)
            counts.add(reduced.x.shape[1])
    assert len(counts) > 1


def test_prumerge_attention_is_not_split_by_head():
    """Against the softmax of whole vectors: heads split and averaged would differ."""
    from vlm_accel.methods.prumerge import unsplit_attention

    features = _features(4, blocks=(5,))
    got = unsplit_attention(features, 5)
    for i in range(IMAGES):
        want = reference.unsplit(*(_np(part[5][i]) for part in (features.keys, features.cls_query, features.cls_key)))
        np.testing.assert_allclose(_np(got[i]), want, atol=1e-12)


@pytest.mark.parametrize(("name", "top"), [("prumerge", 8), ("prumerge_plus", 2)])
def test_prumerge_with_a_ratio_keeps_the_count(name, top):
    """The top stay (plus: a quarter), the token made of the rest is counted."""
    features = _features(5, blocks=(5,))
    method = create(name, ratio=0.3)
    assert method.count(N) == 9
    for i, reduced in enumerate(method.select(features)):
        assert reduced.x.shape == (1, 9, D)
        a = reference.unsplit(*(_np(part[5][i]) for part in (features.keys, features.cls_query, features.cls_key)))
        assert set(reference.ranked(a)[:top]) <= set(reduced.kept[0].tolist())


def test_prumerge_without_any_outlier_keeps_one():
    features = _features(6, blocks=(5,))
    flat = {5: torch.zeros(IMAGES, H, WIDTH, dtype=torch.float64)}
    features.cls_query = flat
    for reduced in create("prumerge").select(features):
        assert reduced.x.shape[1] == 2  # the first token and the one made of the rest
        assert reduced.kept[0].tolist() == [0, 1]


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("layout", [(1, 2), (2, 2)])
def test_hired(ratio, layout):
    tiles = layout[0] * layout[1]
    features = _features(7, images=tiles + 1)
    features.groups = [(0, list(range(1, tiles + 1)), layout)]
    expected = reference.hired(
        _np(features.x), _np(features.cls_attention[0]), _np(features.cls_attention[5]), (5, 6), layout, ratio
    )
    reduced = create("hired", ratio=ratio).select(features)
    for got, want in zip(reduced, expected, strict=True):
        _same(got, want)
    assert sum(r.x.shape[1] for r in reduced) <= int((tiles + 1) * N * ratio)


def test_hired_may_leave_nothing_of_a_tile():
    """All voters in the left half: the right tile gets no token; the base keeps its share."""
    features = _features(8, images=3)
    left = torch.tensor([column < 3 for _ in range(5) for column in range(6)])
    features.cls_attention[0][0] = torch.where(left, features.cls_attention[0][0] + 1, features.cls_attention[0][0])
    features.groups = [(0, [1, 2], (1, 2))]
    assert [r.x.shape[1] for r in create("hired").select(features)] == [9, 9, 0]


def test_hired_single_pictures_keep_their_budget():
    features = _features(9)
    assert [r.x.shape[1] for r in create("hired").select(features)] == [6, 6, 6]


@pytest.mark.parametrize(("count", "tokens"), [(1, 30), (2, 29), (3, 30), (9, 29), (16, 30), (25, 29), (29, 30)])
def test_vispruner(count, tokens):
    features = _features(10, tokens=tokens)
    method = create("vispruner", ratio=count / tokens)
    assert method.count(tokens) == count
    for i, reduced in enumerate(method.select(features)):
        _same(reduced, reference.vispruner(_np(features.x[i]), _np(features.cls_attention[5][i]), count))


@pytest.mark.parametrize("count", [1, 2, 5, 17, 29])
def test_divprune(count):
    features = _features(11)
    for i, reduced in enumerate(create("divprune", ratio=count / N).select(features)):
        _same(reduced, reference.divprune(_np(features.x[i]), count))


def test_divprune_takes_one_of_each_tight_cluster():
    draw = torch.Generator().manual_seed(0)
    x = torch.cat([torch.tensor([1.0, 0, 0]).repeat(6, 1), torch.tensor([0, 1.0, 0]).repeat(5, 1)])
    x = (x + 0.01 * torch.randn(11, 3, generator=draw))[None]
    kept = create("divprune", ratio=2 / 11).select(Features(x=x))[0].kept[0].tolist()
    assert kept[0] < 6 <= kept[1]


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_ratio_one_is_the_identity(name):
    features = _features(12, blocks=(0, 5))
    for i, reduced in enumerate(create(name, ratio=1.0).select(features)):
        assert torch.equal(reduced.x[0], features.x[i])
        assert reduced.x.data_ptr() == features.x[i].data_ptr()
        assert reduced.kept[0].tolist() == list(range(N))


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_an_image_does_not_depend_on_its_neighbours(name):
    features = _features(13)
    together = create(name, ratio=0.4).select(features)
    for i in range(IMAGES):
        alone = Features(
            x=features.x[i : i + 1],
            grid=features.grid,
            **{
                part: {b: t[i : i + 1] for b, t in getattr(features, part).items()}
                for part in ("cls_attention", "keys", "cls_query", "cls_key")
            },
        )
        single = create(name, ratio=0.4).select(alone)[0]
        assert torch.equal(single.kept, together[i].kept)
        torch.testing.assert_close(single.x, together[i].x, atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(FEATURE_METHODS),
    tokens=st.integers(1, 24),
    ratio=st.floats(0.02, 1.0),
    has_cls=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_features_keep_what_they_promise(name, tokens, ratio, has_cls, half, seed):
    """Counts, ascending unique rows, dtype, no NaN; the map agrees with what was done."""
    features = _features(seed, images=2, tokens=tokens, has_cls=has_cls, trace=True)
    features.x = features.x.to(torch.bfloat16 if half else torch.float64)
    method = create(name, ratio=ratio)
    assert isinstance(method, FeatureMethod)
    for reduced in method.select(features):
        kept = reduced.kept[0].tolist()
        assert kept == sorted(set(kept))
        assert all(0 <= row < tokens for row in kept)
        assert reduced.x.shape == (1, len(kept), D)
        assert reduced.x.dtype == features.x.dtype
        assert torch.isfinite(reduced.x).all()
        if method.count(tokens) is not None:
            assert len(kept) == method.count(tokens)
        assert reduced.assign.shape == (1, tokens)
        assert reduced.assign[0][kept].tolist() == list(range(len(kept)))
        assert reduced.assign.max() < max(1, len(kept))
        assert reduced.weight.shape == (1, len(kept), tokens)


@pytest.mark.parametrize("name", FEATURE_METHODS)
@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5])
def test_a_ratio_out_of_range_is_refused(name, ratio):
    with pytest.raises(UserError, match=r"expected a share kept in \(0, 1\]"):
        create(name, ratio=ratio)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(2, 30), share=st.floats(0.01, 1.0), step=st.integers(1, 9), seed=st.integers(0, 99))
def test_greedy_choices_are_subsets(rows, share, step, seed):
    keep = max(1, round(share * rows))
    x = torch.randn(2, rows, 5, generator=torch.Generator().manual_seed(seed))
    for chosen in (distinct(x, keep, step), max_min(cosine_distance(x, x), keep)):
        assert chosen.shape == (2, keep)
        assert all(len(set(row)) == keep for row in chosen.tolist())


# ---- no host synchronisation


def _fake(*shape):
    return torch.empty(*shape, device="cuda")


def test_no_value_is_looked_at_on_the_host():
    """On tensors that only have shapes, as on a GPU: whatever reads a value back raises."""
    with FakeTensorMode(), torch.no_grad():
        features = Features(
            x=_fake(2, 64, 16),
            cls_attention={b: _fake(2, 4, 64) for b in (0, 5)},
            keys={5: _fake(2, 64, 4, 8)},
            cls_query={5: _fake(2, 4, 8)},
            cls_key={5: _fake(2, 4, 8)},
        )
        for name in FEATURE_METHODS:
            assert create(name, ratio=0.4).select(features)[1].x.shape[1] in (25, 26)
        # the check itself: PruMerge lets the picture decide, and must ask the device for the count
        with pytest.raises(DataDependentOutputException):
            create("prumerge").select(features)
