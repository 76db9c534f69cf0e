"""Scores of encoder rows against an independent reference."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from vlm_accel.encoders.scores import Watch, attention_map, importance, logits

_spec = importlib.util.spec_from_file_location("vlm_scores", Path(__file__).with_name("_attention_reference.py"))
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
reference = _module.importance


def draw(heads=4, keys=2, rows=11, dim=3, seed=0):
    numbers = np.random.default_rng(seed)
    return numbers.normal(size=(heads, rows, dim)), numbers.normal(size=(keys, rows, dim))


@pytest.mark.parametrize("kind", ["received", "cls", "lse"])
@pytest.mark.parametrize("chunk", [1, 4, 128])
@pytest.mark.parametrize("bias", [False, True])
def test_scores_equal_the_reference(kind, chunk, bias):
    query, key = draw()
    numbers = np.random.default_rng(1)
    key_bias = numbers.normal(size=10) if bias else None
    mask = np.where(numbers.random((11, 11)) < 0.2, -30.0, 0.0) if bias else None
    expected = reference(query, key, 0.7, kind, 1, key_bias, mask)
    found = importance(
        torch.tensor(query)[None], torch.tensor(key)[None], 0.7, kind, prefix=1, chunk=chunk,
        key_bias=None if key_bias is None else torch.tensor(key_bias)[None],
        bias=None if mask is None else torch.tensor(mask)[None, None],
    )  # fmt: skip
    assert found.dtype == torch.float32
    assert found.shape == (1, 10)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=15)
@given(rows=st.integers(1, 20), heads=st.sampled_from([1, 2, 4]), chunk=st.integers(1, 25), seed=st.integers(0, 99))
def test_received_attention_sums_to_one_for_any_chunk(rows, heads, chunk, seed):
    torch.manual_seed(seed)
    query, key = torch.randn(2, heads, rows, 4), torch.randn(2, 1, rows, 4)
    whole = importance(query, key, 0.5, "received")
    assert torch.allclose(whole.sum(1), torch.ones(2), atol=1e-6)
    assert torch.allclose(importance(query, key, 0.5, "received", chunk=chunk), whole, atol=1e-6)
    assert torch.allclose(attention_map(query, key, 0.5, chunk=chunk).sum(-1), torch.ones(2, heads), atol=1e-6)


def test_no_more_than_a_chunk_of_the_map_is_ever_held(monkeypatch):
    made = []
    plain = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: made.append(out := plain(a, b)) or out)
    importance(torch.randn(1, 2, 300, 4), torch.randn(1, 2, 300, 4), 0.5, "received")
    assert [tuple(part.shape) for part in made] == [(2, 128, 300), (2, 128, 300), (2, 44, 300)]


def test_cls_is_received_without_class_row_and_rows_of_padding_do_not_count():
    query, key = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    assert torch.equal(importance(query, key, 0.5, "cls", cls_row=None), importance(query, key, 0.5, "received"))
    rows = torch.tensor([[True, True, True, True, False, False]])
    seen = importance(query, key, 0.5, "received", rows=rows)
    assert torch.allclose(seen, logits(query[:, :, :4], key, 0.5).softmax(-1).mean((1, 2)), atol=1e-7)


def test_a_bool_mask_hides_keys_also_with_a_key_bias():
    query, key = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    visible = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    visible[..., 4:] = False
    for key_bias in (None, torch.zeros(1, 6)):
        scores = importance(query, key, 0.5, "received", bias=visible, key_bias=key_bias)
        assert torch.equal(scores[:, 4:], torch.zeros(1, 2))
        assert torch.allclose(scores.sum(1), torch.ones(1))


def test_grouped_keys_and_rows_of_padding_take_the_same_way_as_with_a_mask():
    query, key = torch.randn(2, 4, 9, 3), torch.randn(2, 2, 9, 3)
    rows = torch.rand(2, 9) < 0.7
    nothing = torch.zeros(1, 1, 1, 9)
    found = attention_map(query, key, 0.5, rows=rows, chunk=4)
    assert torch.allclose(found, attention_map(query, key, 0.5, nothing, rows=rows), atol=1e-6)


def test_bfloat16_is_scored_in_float32():
    query, key = torch.randn(1, 2, 40, 8).bfloat16(), torch.randn(1, 2, 40, 8).bfloat16()
    assert torch.equal(importance(query, key, 0.5, "received"), importance(query.float(), key.float(), 0.5, "received"))


def test_a_packed_row_is_split_by_the_lengths_that_the_adapter_names():
    query, key = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    wanted = Watch("received", keys=True, queries=True, lengths=[4, 5])
    wanted.see(query, key, 0.5, None, None)
    first, second = wanted.take()
    assert torch.equal(first.scores, importance(query[:, :, :4], key[:, :, :4], 0.5, "received"))
    assert torch.equal(second.scores, importance(query[:, :, 4:], key[:, :, 4:], 0.5, "received"))
    assert first.keys.shape == (1, 4, 2, 4)
    assert torch.equal(second.queries, query[:, :, 4:].transpose(1, 2))
    assert wanted.take() == []


def test_an_unknown_score_is_refused():
    with pytest.raises(UserError, match="received, cls, lse or none"):
        importance(torch.randn(1, 1, 3, 2), torch.randn(1, 1, 3, 2), 1.0, "last")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["received", "cls", "lse"])
def test_half_precision_on_a_gpu_is_scored_as_a_float32_copy(kind):
    query, key = torch.randn(2, 4, 300, 64).bfloat16(), torch.randn(2, 4, 300, 64).bfloat16()
    found = importance(query.cuda(), key.cuda(), 0.125, kind, prefix=1).cpu()
    assert torch.allclose(found, importance(query, key, 0.125, kind, prefix=1), rtol=1e-4, atol=1e-6)
