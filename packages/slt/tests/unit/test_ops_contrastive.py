import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slt.ops.contrastive import (
    INITIAL_LOGIT_SCALE,
    MAX_LOGIT_SCALE,
    VARIANTS,
    contrastive_loss,
    gather_with_gradient,
    masked_mean,
    question_triplet_loss,
)

SCALE = INITIAL_LOGIT_SCALE


def pair(seed, count, dim=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, dim, generator=generator, dtype=torch.float64)


def test_initial_scale():
    assert math.exp(INITIAL_LOGIT_SCALE) == pytest.approx(14.2857142857, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from(VARIANTS))
def test_symmetric_and_blind_to_length_and_order(seed, count, variant):
    a, b = pair(seed, count)
    ids = torch.arange(count) // 2
    loss = contrastive_loss(a, b, SCALE, variant, ids)
    close = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(contrastive_loss(b, a, SCALE, variant, ids), loss, **close)
    lengths = torch.rand(count, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(contrastive_loss(a * lengths, b * 7, SCALE, variant, ids), loss, **close)
    order = torch.randperm(count)
    torch.testing.assert_close(contrastive_loss(a[order], b[order], SCALE, variant, ids[order]), loss, **close)
    if variant != "multi":
        assert loss >= 0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_multi_with_distinct_ids_is_infonce(seed, count):
    a, b = pair(seed, count)
    torch.testing.assert_close(
        contrastive_loss(a, b, SCALE, "multi", range(count)), contrastive_loss(a, b, SCALE), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_row_is_zero(variant):
    a, b = pair(0, 1)
    assert contrastive_loss(a, b, SCALE, variant, ids=["x"]).item() == 0


@pytest.mark.parametrize("count", [2, 5, 16])
def test_equal_features_give_ln_n(count):
    a = torch.ones(count, 3, dtype=torch.float64)
    assert contrastive_loss(a, a, SCALE).item() == pytest.approx(math.log(count), abs=1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_gfslt_is_near_infonce_at_four_rows(seed):
    a, b = pair(seed, 4, dim=64)
    assert abs(contrastive_loss(a, b, SCALE, "gfslt") - contrastive_loss(a, b, SCALE)).item() < 1e-2


@pytest.mark.parametrize(("variant", "together"), [("multi", True), ("infonce", False)])
def test_only_multi_draws_the_takes_of_one_sentence_together(variant, together):
    a, b = pair(3, 4).unbind()
    optimizer = torch.optim.Adam([a.requires_grad_(), b.requires_grad_()], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        contrastive_loss(a, b, SCALE, variant, ids=["s1", "s1", "s2", "s3"]).backward()
        optimizer.step()
    cosines = torch.cosine_similarity(a[:, None], b[None], dim=-1)
    gap = (cosines[0, 0] - cosines[0, 1]).item()
    assert abs(gap) < 0.05 if together else gap > 0.5
    assert cosines[0, 0] > cosines[0, 2:].max() + 0.4


def test_ids_may_be_any_hashables():
    a, b = pair(1, 4)
    as_text = contrastive_loss(a, b, SCALE, "multi", ids=["x", "y", "x", "z"])
    assert as_text == contrastive_loss(a, b, SCALE, "multi", ids=torch.tensor([7, 1, 7, -3]))


def test_the_scale_is_trained_and_clamped():
    a, b = pair(2, 5)
    for value, moves in ((1.0, True), (MAX_LOGIT_SCALE + 1, False)):
        scale = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        loss = contrastive_loss(a, b, scale)
        loss.backward()
        assert (scale.grad != 0).item() is moves
    assert loss == contrastive_loss(a, b, MAX_LOGIT_SCALE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient(variant):
    a, b = pair(4, 4)
    scale = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 0, 1, 2])
    assert torch.autograd.gradcheck(
        lambda *x: contrastive_loss(*x, variant, ids), (a.requires_grad_(), b.requires_grad_(), scale)
    )


def test_narrow_types_are_worked_out_in_float32():
    a, b = pair(5, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(a, b, SCALE)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, contrastive_loss(a.float(), b.float(), SCALE), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 3), 1.0, "clip"), "'clip'; known: infonce, gfslt, multi"),
        ((torch.ones(2, 3), torch.ones(3, 3), 1.0), r"a \(2, 3\) and b \(3, 3\)"),
        ((torch.ones(0, 3), torch.ones(0, 3), 1.0), "N >= 1"),
        ((torch.ones(2, 3), torch.ones(2, 3), 1.0, "multi"), "needs ids"),
        ((torch.ones(2, 3), torch.ones(2, 3), 1.0, "multi", [1, 2, 3]), r"\(3,\); expected \(2,\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(*arguments)


def test_masked_mean_ignores_padding():
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [math.nan, math.inf]], [[math.nan] * 2] * 3], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False] * 3])
    mean = masked_mean(x, mask)
    assert mean.tolist() == [[2.0, 3.0], [0.0, 0.0]]
    mean.sum().backward()
    assert x.grad.tolist() == [[[0.5, 0.5], [0.5, 0.5], [0, 0]], [[0, 0]] * 3]
    assert masked_mean(x[:, :0], mask[:, :0]).tolist() == [[0.0, 0.0], [0.0, 0.0]]


class TestTriplet:
    def test_equal_features_give_ln_3(self):
        x = torch.ones(4, 5, dtype=torch.float64)
        assert question_triplet_loss(x, x).item() == pytest.approx(math.log(3), abs=1e-12)

    def test_small_batches_take_the_negatives_there_are(self):
        x = torch.ones(2, 5, dtype=torch.float64)
        assert question_triplet_loss(x, x).item() == pytest.approx(math.log(2), abs=1e-12)
        assert question_triplet_loss(x[:1], x[:1]).item() == 0

    def test_gradient(self):
        a, b = pair(6, 3)
        negatives = pair(7, 3).transpose(0, 1).contiguous()
        inputs = (a.requires_grad_(), b.requires_grad_(), negatives.requires_grad_())
        assert torch.autograd.gradcheck(question_triplet_loss, inputs)

    def test_bad_shapes(self):
        with pytest.raises(ValueError, match="anchor"):
            question_triplet_loss(torch.ones(2, 3), torch.ones(3, 3))
        with pytest.raises(ValueError, match="negatives"):
            question_triplet_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, 2, 3))


def test_gather_is_the_identity_in_one_process():
    x = torch.ones(3, 2)
    assert gather_with_gradient(x) is x
