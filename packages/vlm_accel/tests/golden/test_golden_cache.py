"""Scores and choices of the cache methods against float64 NumPy."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vlm_accel.budget import KVBudget
from vlm_accel.llm.choose import choose, choose_across_heads, protected_entries
from vlm_accel.methods import create
from vlm_accel.methods.base import CacheView
from vlm_accel.ops.cache_scores import attention_sums, window_scores

_spec = importlib.util.spec_from_file_location("vlm_cache_reference", Path(__file__).with_name("_cache_reference.py"))
truth = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(truth)

B, H, K, N, D, W = 2, 6, 2, 23, 8, 9


@pytest.fixture
def case():
    """Two samples, the second with five columns of padding, entries with gaps that differ per head."""
    draw = np.random.default_rng(3)
    index = np.stack([np.stack([np.sort(draw.permutation(40)[:N]) for _ in range(K)]) for _ in range(B)])
    index[..., -W:] = np.arange(41, 41 + W)  # the last queries' own entries
    valid = np.ones((B, K, N), dtype=bool)
    valid[1, :, :5] = False
    return {
        "queries": draw.normal(size=(B, H, W, D)) * 2, "keys": draw.normal(size=(B, K, N, D)), "index": index,
        "valid": valid, "query_index": np.broadcast_to(np.arange(41, 41 + W), (B, W)).copy(), "scaling": 0.3,
    }  # fmt: skip


def view_of(case, budget=None, **more):
    """The case as methods see it."""
    tensors = {name: torch.from_numpy(case[name]) for name in ("queries", "keys", "index", "valid", "query_index")}
    given = {
        "layer": 1, "depth": 4, "values": torch.zeros(B, K, N, D), "image": torch.zeros(B, K, N, dtype=torch.bool),
        "scaling": case["scaling"], "budget": budget or KVBudget.uniform(12, sink=2, recent=4, window=5), "entries": 12,
    }  # fmt: skip
    return CacheView(**(tensors | given | more))


@pytest.mark.parametrize(("width", "pool"), [(5, 1), (9, 3), (1, 1), (50, 5)])
def test_window_scores(case, width, pool):
    np.testing.assert_allclose(
        window_scores(view_of(case), width, pool).numpy(), truth.window(case, width, pool), atol=1e-12
    )


def test_queries_of_padding_count_for_nothing(case):
    case["query_index"][1, :3] = -1
    np.testing.assert_allclose(window_scores(view_of(case), 9).numpy(), truth.window(case, 9, 1), atol=1e-12)
    case["query_index"][1] = -1
    assert window_scores(view_of(case), 9)[1].eq(0).all()


def test_softcap(case):
    case["cap"] = 1.5
    got = window_scores(view_of(case, softcap=1.5), 5).numpy()
    np.testing.assert_allclose(got, truth.window(case, 5, 1), atol=1e-12)
    assert abs(got - window_scores(view_of(case), 5).numpy()).max() > 1e-3


def test_default_queries_are_those_of_the_last_entries(case):
    named, unnamed = window_scores(view_of(case)), window_scores(view_of(case, query_index=None))
    assert torch.equal(named, unnamed)


@pytest.mark.parametrize("chunk", [1, 4, 128])
def test_attention_sums(case, chunk):
    sums, seen = attention_sums(view_of(case), chunk=chunk)
    want, saw = truth.sums(case)
    np.testing.assert_allclose(sums.numpy(), want, atol=1e-12)
    np.testing.assert_array_equal(seen.numpy(), saw)


def test_snapkv_keeps_its_window_above_all(case):
    scores = create("snapkv", window=4, pool=3).entry_scores(view_of(case)).numpy()
    np.testing.assert_allclose(scores[..., :-4], truth.window(case, 4, 3)[..., :-4], atol=1e-12)
    assert (scores[..., -4:] > 1).all()
    assert (np.diff(scores[..., -4:]) > 0).all()


def test_lightvlm_rule_is_the_window_of_the_budget(case):
    budget = KVBudget.uniform(12, sink=2, recent=4, window=5, pool=3)
    for name in ("lightvlm", "window_kv"):
        got = create(name).entry_scores(view_of(case, budget)).numpy()
        np.testing.assert_allclose(got, truth.window(case, 5, 3), atol=1e-12)


def test_tova_is_the_last_query_over_all_heads(case):
    scores = create("tova").entry_scores(view_of(case)).numpy()
    want = truth.window(case, 1, 1).mean(1, keepdims=True)
    np.testing.assert_allclose(scores, np.broadcast_to(want, scores.shape), atol=1e-12)


@pytest.mark.parametrize("normalise", [True, False])
def test_h2o_adds_up_over_calls(case, normalise):
    """Queries told of in two portions, with entries that came between, give the sums of all of them."""
    method, state = create("h2o", normalise=normalise), {}
    late = 4  # the last entries come with the second portion
    early = {
        **case,
        **{name: case[name][..., :-late] for name in ("index", "valid")},
        "keys": case["keys"][..., :-late, :],
    }
    early |= {"queries": case["queries"][:, :, :-late], "query_index": case["query_index"][:, :-late]}
    rest = {**case, "queries": case["queries"][:, :, -late:], "query_index": case["query_index"][:, -late:]}
    method.observe(view_of(early, state=state))
    method.observe(view_of(rest, state=state))
    sums, seen = truth.sums(case)
    want = sums / np.maximum(seen, 1) if normalise else sums
    scores = method.entry_scores(view_of(case, state=state)).numpy()
    np.testing.assert_allclose(scores[..., :-6], want[..., :-6], atol=1e-12)
    assert (scores[..., -6:] > 1e8).all()  # 12 // 2 of the budget are the recent half
    assert (np.diff(scores[..., -6:]) > 0).all()


def test_choose(case):
    draw = np.random.default_rng(0)
    scores = draw.integers(0, 4, size=(B, K, N)) / 4  # many ties
    budget = KVBudget.uniform(12, sink=2, recent=4)
    valid = torch.from_numpy(case["valid"])
    stay = protected_entries(budget, valid, torch.from_numpy(case["index"]), torch.zeros_like(valid))
    rows = choose(torch.from_numpy(scores), valid, stay, 12)
    for b in range(B):
        first = 5 if b else 0
        want_stay = np.zeros(N, dtype=bool)
        want_stay[[first, first + 1, *range(N - 4, N)]] = True
        for k in range(K):
            np.testing.assert_array_equal(stay[b, k].numpy(), want_stay)
            assert rows[b, k].tolist() == truth.keep_best(scores[b, k], case["valid"][b, k], want_stay, 12)


def test_choose_takes_padding_only_when_nothing_else_is_left(case):
    valid = torch.from_numpy(case["valid"])
    none = torch.zeros_like(valid)
    rows = choose(torch.full(valid.shape, -torch.inf), valid, none, N - 3)
    assert rows[1, 0].tolist() == [0, 1, *range(5, N)]


def test_choose_across_heads():
    draw = np.random.default_rng(1)
    scores = draw.random((3, K, N)) * np.array([1.0, 0.3])[None, :, None]
    every = torch.ones(3, K, N, dtype=torch.bool)
    kept = choose_across_heads(torch.from_numpy(scores), every, torch.zeros_like(every), 10).numpy()
    for b in range(3):
        np.testing.assert_array_equal(kept[b], truth.keep_across_heads(scores[b], 10))
    assert (kept.sum((1, 2)) == K * 10).all()
    assert (kept.sum(2) >= 2).all()
    assert len({int(n) for n in kept.sum(2).flatten()}) > 1


@pytest.mark.parametrize(("scope", "first"), [("all", -1), ("image", -1), ("no_system", 45), ("no_system", -1)])
def test_protected_by_scope(case, scope, first):
    image = torch.zeros(B, K, N, dtype=torch.bool)
    image[..., 8:15] = True
    budget = KVBudget.uniform(12, sink=0, recent=0, scope=scope)
    index = torch.from_numpy(case["index"])
    valid = torch.from_numpy(case["valid"])
    stay = protected_entries(budget, valid, index, image, torch.full((B, 1), first))
    want = {"all": torch.zeros_like(valid), "image": ~image, "no_system": index < first}[scope] & valid
    assert torch.equal(stay, want)


def test_random_is_a_function_of_the_entry(case):
    method = create("random_kv")
    whole = method.entry_scores(view_of(case, state={}))
    assert len(whole.unique()) > 0.9 * B * K * 18
    assert ((whole >= 0) & (whole < 1)).all()
    state = {}
    method.entry_scores(view_of(case, state=state))
    fewer = {**case, "index": case["index"][..., 9:], "valid": case["valid"][..., 9:]}
    assert torch.equal(method.entry_scores(view_of(fewer, state=state)), whole[..., 9:])
    assert not torch.equal(method.entry_scores(view_of(case, state={}, seed=1)), whole)
    assert not torch.equal(method.entry_scores(view_of(case, state={}, layer=2)), whole)
    moved = {**case, "index": case["index"] + 7}
    assert torch.equal(method.entry_scores(view_of(moved, state={})), whole)


@pytest.mark.parametrize("name", ["streaming_llm", "recent_kv"])
def test_later_is_better(case, name):
    scores = create(name).entry_scores(view_of(case))
    assert (scores.diff() > 0).all()


def test_rerotated_keys_stand_without_gaps():
    """A key made at place p and turned equals the key made at its new place."""
    draw = np.random.default_rng(5)
    raw = draw.normal(size=(N, D))
    index = np.arange(N)
    keys = np.stack([truth.rotate(raw[j], j) for j in index])
    kept = [0, 1, *range(N - 6, N)]
    inverse = torch.tensor([1 / 10000.0 ** (2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    kwargs = {"rotary_emb": SimpleNamespace(inv_freq=inverse), "position_embeddings": (torch.zeros(1, 1, D),) * 2}
    view = CacheView(
        layer=0, depth=1, keys=None, values=None, queries=None, valid=None, image=None, scaling=1.0, kwargs=kwargs,
        index=torch.from_numpy(index)[None, None].expand(1, K, N), budget=KVBudget.uniform(8, sink=2, recent=1),
    )  # fmt: skip
    layer = SimpleNamespace(keys=torch.from_numpy(keys[kept]).expand(1, K, -1, -1))
    method = create("streaming_llm", rerotate=True)
    method.moved(view, torch.tensor([kept]), layer)
    want = [truth.rotate(raw[j], N - 8 + place) for place, j in enumerate(kept)]
    np.testing.assert_allclose(layer.keys[0, 1].numpy(), np.stack(want), atol=2e-6)  # the rule turns in float32
