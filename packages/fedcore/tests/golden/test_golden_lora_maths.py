"""Start, aggregation and forward pass of low-rank adapters against float64 NumPy."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from fedcore.lora import LoraLinear, aggregate_concat_qr, qr_init, residual_factors
from torch import nn


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_lora{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _load("_lora_reference")

SHAPES = [(16, 12), (9, 20), (11, 11)]
WEIGHTS = (0.2, 0.3, 0.5)
RANKS = (1, 2, 3)
KNOWN = {
    "qr": [12.571995, 8.103184, 5.683152, 0.0],
    "qr_pivoted": [9.027178, 7.296618, 5.160341, 0.0],
    "svd": [8.743458, 6.15309, 4.447567, 0.0],
}


def close(found, expected):
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


def draw_factors(d, k, ranks=RANKS, seed=3):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((r, k)), rng.standard_normal((d, r))) for r in ranks]


def tensors(factors):
    return [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in factors]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 9])
@pytest.mark.parametrize(("scaling", "rms"), [(1.0, None), (2.0, 1e-4), (8.0, 0.03)])
def test_start(shape, rank, scaling, rms):
    weight = np.random.default_rng(0).standard_normal(shape)
    found = qr_init(torch.from_numpy(weight), rank, scaling, rms)
    for one, expected in zip(found, reference.qr_init(weight, rank, scaling, rms), strict=True):
        close(one, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decomposition", ["qr", "qr_pivoted", "svd"])
@pytest.mark.parametrize("thin", [True, False])
def test_aggregate(shape, decomposition, thin):
    factors = draw_factors(*shape)
    targets = [3, 1, 6, 2]
    found = aggregate_concat_qr(tensors(factors), WEIGHTS, targets, decomposition, thin)
    for rank, (a, b) in zip(targets, found, strict=True):
        expected_a, expected_b = reference.aggregate(factors, WEIGHTS, rank, decomposition)
        close(a, expected_a)
        close(b, expected_b)


@pytest.mark.parametrize("shape", SHAPES)
def test_concatenation_is_the_exact_sum(shape):
    factors = draw_factors(*shape)
    a, b = residual_factors(tensors(factors), WEIGHTS)
    assert (a.shape, b.shape) == ((6, shape[1]), (shape[0], 6))
    close(b @ a, reference.product(factors, WEIGHTS))


def test_errors_of_a_known_case():
    """Frobenius errors at ranks 1 to 3 of the case above, 16x12, from the reference; 0 at rank 6."""
    factors = draw_factors(16, 12)
    delta = reference.product(factors, WEIGHTS)
    errors = {}
    for name in ("qr", "qr_pivoted", "svd"):
        pairs = aggregate_concat_qr(tensors(factors), WEIGHTS, [1, 2, 3, 6], name)
        errors[name] = [float(np.linalg.norm(delta - (b @ a).numpy())) for a, b in pairs]
    for name, known in KNOWN.items():
        np.testing.assert_allclose(errors[name], known, atol=5e-6)


@pytest.mark.parametrize("scaling", [0.5, 2.0])
def test_forward_and_gradients(scaling):
    rng = np.random.default_rng(1)
    weight, bias, a, b, x = (rng.standard_normal(s) for s in ((5, 7), (5,), (2, 7), (5, 2), (4, 7)))
    linear = nn.Linear(7, 5, dtype=torch.float64)
    linear.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    adapted = LoraLinear(linear, 2, scaling, factors=(torch.from_numpy(a), torch.from_numpy(b)))
    outputs = adapted(torch.from_numpy(x))
    (outputs.square().sum() / 2).backward()
    y, grad_a, grad_b = reference.layer(weight, bias, a, b, scaling, x)
    close(outputs.detach(), y)
    close(adapted.factors[0].grad, grad_a)
    close(adapted.factors[1].grad, grad_b)
    assert linear.weight.grad is None
    assert linear.bias.grad is None
