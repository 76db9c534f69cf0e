"""Properties of the perturbations."""

import pytest
import torch
from fedcore.ops.sam import adaptive_perturbation, perturbation, scale_to
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS, P = 3, 7
seeds = st.integers(0, 10_000)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, r=st.floats(0.0, 10.0))
def test_length_and_direction(seed, r):
    grad = draw(seed, ROWS, P)
    eps = perturbation(grad.clone(), r)
    torch.testing.assert_close(eps.norm(dim=-1), torch.full((ROWS,), r, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close((eps * grad).sum(-1), r * grad.norm(dim=-1), rtol=1e-12, atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, r=st.floats(0.01, 10.0), a=st.floats(0.0, 2.0))
def test_adaptive_length_is_measured_in_sizes_of_parameters(seed, r, a):
    params, grad = draw(seed, ROWS, P), draw(seed + 1, ROWS, P)
    kept = params.clone()
    eps = adaptive_perturbation(params, grad.clone(), r, a)
    length = (eps / (params.abs() + a)).norm(dim=-1)
    torch.testing.assert_close(length, torch.full((ROWS,), r, dtype=torch.float64), rtol=1e-10, atol=0)
    assert torch.equal(params, kept)
    assert bool(((eps * grad) >= 0).all())


@settings(max_examples=25, deadline=None)
@given(seed=seeds, factor=st.floats(0.01, 100.0))
def test_adaptive_perturbation_follows_a_rescaled_model(seed, factor):
    """Parameters c times as large whose gradients are 1/c as large: the same perturbation, c times as large."""
    params, grad = draw(seed, P), draw(seed + 1, P)
    one = adaptive_perturbation(params, grad.clone(), 0.3, 0.0)
    other = adaptive_perturbation(factor * params, grad / factor, 0.3, 0.0)
    torch.testing.assert_close(other, factor * one, rtol=1e-10, atol=1e-14)


def test_large_a_forgets_the_sizes():
    params, grad = draw(1, P), draw(2, P)
    one = adaptive_perturbation(params, grad.clone(), 1e-8, 1e8)
    torch.testing.assert_close(one, perturbation(grad, 1.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_gradients_give_zero(dtype):
    grad = torch.stack([torch.zeros(P), torch.ones(P)]).to(dtype)
    eps = perturbation(grad.clone(), 0.5)
    assert torch.equal(eps[0], torch.zeros(P, dtype=dtype))
    assert eps[1].norm().item() == pytest.approx(0.5, rel=1e-6)
    both = adaptive_perturbation(torch.ones(P, dtype=dtype), grad.clone(), 0.5, 0.2)
    assert torch.equal(both[0], torch.zeros(P, dtype=dtype))
    tiny = perturbation(torch.full((P,), 1e-42, dtype=dtype), 5.0)  # its squares are zero in float32
    assert bool(tiny.isfinite().all())


def test_what_is_not_finite_stays_visible():
    assert scale_to(torch.tensor([1.0, torch.nan]), 0.1).isnan().any()


def test_written_in_place():
    grad = draw(3, P)
    assert perturbation(grad, 0.1).data_ptr() == grad.data_ptr()
    assert adaptive_perturbation(draw(4, P), grad, 0.1, 0.1).data_ptr() == grad.data_ptr()
