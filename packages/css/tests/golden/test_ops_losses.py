"""The binary loss with soft targets against a slow float64 reference, and its limits."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from css.ops.labels import one_hot, pseudo_label
from css.ops.losses import soft_binary_loss
from hypothesis import given, settings
from hypothesis import strategies as st

_spec = importlib.util.spec_from_file_location("css_reference", Path(__file__).with_name("_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


def world(seed, channels=4, shape=(2, 3, 4)):
    """Logits, and targets of every kind: hard rows, mixed rows, rows that sum to less than 1, ignored rows."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([*range(channels), 255], size=shape)
    target = reference.one_hot(labels, channels)
    share = rng.uniform(size=(shape[0], 1, *shape[1:])) * rng.integers(0, 2, size=(shape[0], 1, *shape[1:]))
    target *= 1 - share
    target[:, channels - 1] += share[:, 0]
    return 4.0 * rng.normal(size=target.shape), target


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_soft_binary_loss(seed, channels):
    logits, target = world(seed, channels)
    found = soft_binary_loss(torch.from_numpy(logits), torch.from_numpy(target))
    assert found.item() == pytest.approx(reference.soft_binary_loss(logits, target), rel=1e-12, abs=1e-12)


def test_by_hand():
    # An undecided network pays ln 2 a channel.
    target = one_hot(torch.tensor([[[0, 2, 255]]]), 3)
    assert soft_binary_loss(torch.zeros(1, 3, 1, 3), target).item() == pytest.approx(3 * math.log(2), rel=1e-6)


def test_gradient():
    logits, target = world(3)
    logits = torch.from_numpy(logits).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: soft_binary_loss(z, torch.from_numpy(target)), logits)


def test_ignored_pixels_count_nowhere():
    logits, target = (torch.from_numpy(x) for x in world(4))
    target[0, :, 0] = 0.0
    ignored = target.sum(dim=1, keepdim=True) == 0
    logits.requires_grad_()
    loss = soft_binary_loss(logits, target)
    loss.backward()
    assert not logits.grad.masked_select(ignored).any()
    assert logits.grad.masked_select(~ignored).all()
    other = torch.where(ignored, 7.0 * torch.ones_like(logits), logits.detach())
    assert soft_binary_loss(other, target) == loss


def test_nothing_to_learn_from_costs_nothing():
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = soft_binary_loss(logits, torch.zeros(1, 3, 2, 2))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_pseudo_labels_that_are_never_sure_leave_plain_fine_tuning():
    generator = torch.Generator().manual_seed(5)
    logits, old = (torch.randn(2, s, 6, 6, generator=generator) for s in (5, 3))
    labels = torch.tensor([0, 3, 4, 255])[torch.randint(0, 4, (2, 6, 6), generator=generator)]
    plain = soft_binary_loss(logits, one_hot(labels, 5))
    assert soft_binary_loss(logits, one_hot(pseudo_label(labels, old, 1.1), 5)) == plain
    assert soft_binary_loss(logits, one_hot(pseudo_label(labels, old, 0.5), 5)) != plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_logits_are_summed_in_float32(dtype):
    generator = torch.Generator().manual_seed(6)
    logits = (20.0 * torch.randn(2, 151, 8, 8, generator=generator)).to(dtype).requires_grad_()
    target = one_hot(torch.randint(0, 151, (2, 8, 8), generator=generator), 151)
    with torch.autocast("cpu", torch.bfloat16):
        loss = soft_binary_loss(logits, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(soft_binary_loss(logits.detach().double(), target).item(), rel=1e-5)
    loss.backward()
    assert logits.grad.dtype == dtype
    assert logits.grad.isfinite().all()


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="expected both"):
        soft_binary_loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, 2))
