"""Region distillation against a slow float64 reference, MiB's formula, automatic differentiation and its limits."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from css.ops.distill import VARIANTS, region_distillation
from hypothesis import given, settings
from hypothesis import strategies as st

_spec = importlib.util.spec_from_file_location("css_reference", Path(__file__).with_name("_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

OLD, NEW = 3, 2


def world(seed, old=OLD, new=NEW, shape=(2, 4, 5), scale=3.0):
    """New logits, old logits, labels with every kind of pixel; tensors in float64."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 0, *range(old, old + new), 255], size=shape)
    fresh, known = (scale * rng.normal(size=(shape[0], s, *shape[1:])) for s in (old + new, old))
    return tuple(torch.from_numpy(x) for x in (fresh, known, labels))


def by_autograd(new, old, labels, variant):
    """The formula in logarithms, whole and without thrift; gradients come from PyTorch."""
    known = old.shape[1]
    log_q, p = new.log_softmax(dim=1), old.softmax(dim=1)
    region = (labels >= known) & (labels != 255)
    fresh = log_q[:, known:].logsumexp(dim=1)
    both = torch.logaddexp(fresh, log_q[:, 0])
    log_a = both if variant == "mib" else torch.where(region, fresh, log_q[:, 0])
    loss = -((p[:, 1:] * log_q[:, 1:known]).sum(dim=1) + p[:, 0] * log_a) / known
    return (loss * region if variant == "new_only" else loss).mean()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from(VARIANTS),
    st.sampled_from([None, 1, 7, 23]),
)
def test_loss_and_gradient(seed, old, new, variant, chunk):
    logits, known, labels = world(seed, old, new)
    logits.requires_grad_()
    loss = region_distillation(logits, known, labels, variant, chunk)
    arrays = (x.detach().numpy() for x in (logits, known, labels))
    assert loss.item() == pytest.approx(reference.region_distillation(*arrays, variant), rel=1e-11, abs=1e-13)
    (found,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(by_autograd(logits, known, labels, variant), logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        assert region_distillation(logits, known, labels, variant, chunk) == loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    logits, known, labels = world(1)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: 3.0 * region_distillation(z, known, labels, variant, 6), logits)


@pytest.mark.parametrize("new", [1, 4])
def test_mib_is_mib(new):
    logits, known, labels = world(2, new=new)
    found = region_distillation(logits, known, labels, "mib").item()
    assert found == pytest.approx(reference.mib_distillation(logits.numpy(), known.numpy()), rel=1e-12)
    assert region_distillation(logits, known, torch.zeros_like(labels), "mib").item() == found


@pytest.mark.parametrize("low", [-1e4, -float("inf")])
@pytest.mark.parametrize("variant", ["two_region", "mib"])
def test_new_classes_that_are_out_of_the_question_leave_plain_cross_entropy(variant, low):
    logits, known, labels = world(3)
    logits[:, OLD:] = low
    logits.requires_grad_()
    labels[labels >= OLD] = 0  # R is empty; nothing but 0 and 0
    found = region_distillation(logits, known, labels, variant)
    plain = torch.nn.functional.cross_entropy(logits[:, :OLD], known.softmax(dim=1)) / OLD
    assert found.item() == pytest.approx(plain.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(found, logits)
    (expected,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-15)


def test_one_new_class_is_finite():
    logits, known, labels = world(4, new=1)
    labels[0] = OLD
    logits.requires_grad_()
    loss = region_distillation(logits, known, labels, "new_only")
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() > 0
    assert grad.isfinite().all()
    assert grad[0, OLD].all()  # the first new class belongs to the new classes


def test_the_regions_add_up():
    logits, known, labels = world(5)
    inside = region_distillation(logits, known, labels, "new_only").item()
    every = region_distillation(logits, known, labels, "two_region").item()
    region = (labels >= OLD) & (labels != 255)
    background = -(known.softmax(dim=1) * logits.log_softmax(dim=1)[:, :OLD]).sum(dim=1) / OLD
    assert 0 < inside < every
    assert every - inside == pytest.approx((background * ~region).mean().item(), rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ignored_pixels_are_background_to_the_distillation(variant):
    logits, known, labels = world(6)
    assert (labels == 255).any()
    found = region_distillation(logits, known, labels, variant)
    assert region_distillation(logits, known, torch.where(labels == 255, 0, labels), variant) == found
    narrow = labels.to(torch.uint8)
    assert region_distillation(logits, known, narrow, variant) == found


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.sampled_from(VARIANTS))
def test_a_constant_on_all_channels_changes_nothing(seed, first, second, variant):
    logits, known, labels = world(seed)
    found = region_distillation(logits + first, known + second, labels, variant).item()
    assert found == pytest.approx(region_distillation(logits, known, labels, variant).item(), rel=1e-9)


def test_the_old_network_gets_no_gradient_and_inputs_stay():
    logits, known, labels = world(7)
    copies = [x.clone() for x in (logits, known, labels)]
    logits.requires_grad_()
    known.requires_grad_()
    region_distillation(logits, known, labels).backward()
    assert known.grad is None
    assert logits.grad.any()
    for before, after in zip(copies, (logits, known, labels), strict=True):
        assert torch.equal(before, after)


def test_a_graph_may_be_walked_twice():
    logits, known, labels = world(8)
    logits.requires_grad_()
    loss = region_distillation(logits, known, labels)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(first, second)


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_layout_in_memory(variant):
    logits, known, labels = world(9, shape=(2, 6, 8))
    found = region_distillation(logits.clone().requires_grad_(), known, labels, variant, 10)
    last = [x.to(memory_format=torch.channels_last) for x in (logits, known)]
    cut = [torch.nn.functional.pad(x, (1, 2, 0, 3))[:, :, :-3, 1:-2] for x in (logits, known)]
    for new, old in (last, cut):
        new = new.detach().requires_grad_()
        loss = region_distillation(new, old, labels, variant, 10)
        torch.testing.assert_close(loss, found)
        (grad,) = torch.autograd.grad(loss, new)
        whole = logits.clone().requires_grad_()
        (expected,) = torch.autograd.grad(by_autograd(whole, known, labels, variant), whole)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_narrow_logits_are_worked_out_in_float32(variant, dtype):
    logits, known, labels = world(10, old=20, new=5, shape=(2, 8, 8), scale=30.0)
    new = logits.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = region_distillation(new, known.to(dtype), labels, variant)
    assert loss.dtype == torch.float32
    wide = new.detach().double().requires_grad_()
    expected = by_autograd(wide, known.to(dtype).double(), labels, variant)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    (grad,) = torch.autograd.grad(1024.0 * loss, new)
    (truth,) = torch.autograd.grad(1024.0 * expected, wide)
    assert grad.dtype == dtype
    assert grad.isfinite().all()
    torch.testing.assert_close(grad.double(), truth, rtol=2e-2, atol=1e-4)


def test_the_largest_logits_of_float16_are_finite():
    logits = torch.full((1, 5, 2, 2), -6e4, dtype=torch.float16)
    logits[:, 1] = 6e4
    logits.requires_grad_()
    known = torch.zeros(1, 3, 2, 2, dtype=torch.float16)
    known[:, 0] = 6e4
    for variant in VARIANTS:
        loss = region_distillation(logits, known, torch.tensor([[[0, 3], [4, 255]]]), variant)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert grad.isfinite().all()


def test_a_scale_too_small_for_float16_is_not_rounded_before_the_product():
    # 1 / (T pixels) of a whole crop is below what float16 resolves; times a loss scale the product is not.
    logits, known, labels = world(11, old=16, new=2, shape=(1, 64, 64))
    new = logits.half().requires_grad_()
    (grad,) = torch.autograd.grad(0.01 * region_distillation(new, known, labels), new)
    wide = new.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(0.01 * by_autograd(wide, known, labels, "two_region"), wide)
    large = truth.abs() > 1e-7
    assert large.any()
    # Subnormal numbers of float16 lie 6e-8 apart: no error beyond half of that.
    assert (grad.double() - truth).abs().max() <= 3.1e-8


def test_what_does_not_fit_is_refused():
    logits, known, labels = world(12)
    with pytest.raises(ValueError, match="unknown variant 'both'"):
        region_distillation(logits, known, labels, "both")
    with pytest.raises(ValueError, match="expected more new ones"):
        region_distillation(known, known, labels)
    with pytest.raises(ValueError, match="chunk=0"):
        region_distillation(logits, known, labels, chunk=0)
    for wrong in ((logits[:, :, 1:], known, labels), (logits, known, labels[0]), (logits, known[:1], labels)):
        with pytest.raises(ValueError, match=r"expected \(B, S, H, W\), \(B, T, H, W\) and \(B, H, W\)"):
            region_distillation(*wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_under_autocast_are_finite(variant, dtype):
    torch.manual_seed(0)
    head = torch.nn.Conv2d(6, OLD + 1, 1)
    features, known, labels = torch.randn(2, 6, 5, 5) * 40, torch.randn(2, OLD, 5, 5) * 40, torch.full((2, 5, 5), OLD)
    labels[0, 0], labels[1, 1] = 0, 255
    with torch.autocast("cpu", dtype):
        logits = head(features)
        loss = 5.0 * region_distillation(logits, known, labels, variant)
    assert logits.dtype == dtype
    assert loss.dtype == torch.float32
    loss.backward()
    assert loss.isfinite()
    assert head.weight.grad.isfinite().all()
    assert head.weight.grad.any()
