"""Curvature and sharpness against closed forms and a dense NumPy Hessian."""

import numpy as np
import pytest
import torch
from fedcore.landscape import (
    DatasetLoss,
    filter_normalised,
    hessian_eigenvalue,
    hessian_product,
    loss_surface,
    sharpness,
)
from fedcore.spec import ParamSpec
from polymodal.errors import UserError
from torch import nn
from torch.utils.data import Subset, TensorDataset


def quadratic(eigenvalues: list[float], seed: int = 0):
    draw = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(draw.normal(size=(len(eigenvalues), len(eigenvalues))))
    matrix = torch.from_numpy(basis @ np.diag(eigenvalues) @ basis.T)
    return matrix, lambda params: 0.5 * params @ matrix @ params + params.sum()


def dense_softmax_hessian(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Hessian of the mean cross-entropy of a linear softmax model: mean of (diag p - p p') kron (z z')."""
    classes, features = weight.shape
    logits = x @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    total = np.zeros((classes * (features + 1),) * 2)
    for row, prob in zip(x, p, strict=True):
        curvature = np.diag(prob) - np.outer(prob, prob)
        # d logit_c / d weight_{c, f} = x_f, d logit_c / d bias_c = 1, flat order: all weights, then all biases
        jacobian = np.concatenate([np.kron(np.eye(classes), row), np.eye(classes)], axis=1)
        total += jacobian.T @ curvature @ jacobian
    return total / len(x)


@pytest.fixture
def softmax():
    draw = np.random.default_rng(3)
    x, y = draw.normal(size=(30, 4)), draw.integers(0, 3, size=30)
    model = nn.Linear(4, 3, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(draw.normal(size=(3, 4))))
        model.bias.copy_(torch.from_numpy(draw.normal(size=3)))
    return model, TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), x


@pytest.mark.parametrize("eigenvalues", [[5.0, 3.0, 0.5, 0.0, -1.0], [1.0, -7.0, -2.0, 0.3, 0.0]])
def test_largest_eigenvalue_of_a_quadratic(eigenvalues):
    matrix, loss = quadratic(eigenvalues)
    found = hessian_eigenvalue(loss, torch.ones(5, dtype=torch.float64), iterations=2000, tolerance=1e-8)
    assert found.converged
    assert found.value == pytest.approx(max(eigenvalues), abs=1e-10)
    assert float((matrix @ found.vector - found.value * found.vector).norm()) == pytest.approx(
        found.residual, abs=1e-12
    )


def test_residual_bounds_the_error_and_running_out_is_said():
    _, loss = quadratic([5.0, 4.9, 1.0])
    found = hessian_eigenvalue(loss, torch.zeros(3, dtype=torch.float64), iterations=2)
    assert not found.converged
    assert found.iterations == 2
    assert min(abs(found.value - each) for each in (5.0, 4.9, 1.0)) <= found.residual


def test_products_and_eigenvalue_match_the_dense_hessian(softmax):
    model, data, x = softmax
    dense = dense_softmax_hessian(x, model.weight.detach().numpy(), model.bias.detach().numpy())
    loss = DatasetLoss(model, data, batch_size=7)
    for column in np.eye(len(dense)):
        product = hessian_product(loss, loss.flat, torch.from_numpy(column))
        np.testing.assert_allclose(product.numpy(), dense @ column, atol=1e-12)
    found = hessian_eigenvalue(loss, loss.flat, iterations=500, tolerance=1e-7)
    assert found.value == pytest.approx(np.linalg.eigvalsh(dense)[-1], abs=1e-10)


def test_linear_loss_has_no_curvature():
    found = hessian_eigenvalue(lambda params: params.sum(), torch.zeros(4))
    assert (found.value, found.residual, found.converged) == (0.0, 0.0, True)


def test_dataset_loss_is_the_mean_and_leaves_the_model_alone(softmax):
    _, data, _ = softmax
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    loss = DatasetLoss(model, Subset(data, range(5, 25)), batch_size=6)
    value = loss(loss.flat).detach()
    moved = loss(1.5 * loss.flat).detach()
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()
    x, y = data[5:25]
    assert float(value) == pytest.approx(nn.functional.cross_entropy(model(x), y).item(), abs=1e-12)
    assert float(moved) != pytest.approx(float(value), abs=1e-3)


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False, dtype=torch.float64)
            self.second = nn.Linear(3, 3, bias=False, dtype=torch.float64)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = DatasetLoss(Tied(), TensorDataset(x, x), nn.functional.mse_loss)
    assert loss.flat.shape == (9,)
    weight = torch.arange(9.0, dtype=torch.float64)
    square = weight.view(3, 3)
    assert float(loss(weight)) == pytest.approx(float(((x @ square.T @ square.T - x) ** 2).mean()), rel=1e-12)


def test_attention_can_be_differentiated_twice():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation="gelu", batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)).double()
    data = TensorDataset(torch.randn(6, 3, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2]))
    loss = DatasetLoss(model, data)
    vector = torch.randn(loss.flat.shape, generator=torch.Generator().manual_seed(1)).double()
    product = hessian_product(loss, loss.flat, vector)
    step = 1e-5
    ends = []
    for sign in (1, -1):
        point = (loss.flat + sign * step * vector).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(point), point)
        ends.append(gradient)
    torch.testing.assert_close(product, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)


def test_filters_are_as_long_as_the_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    spec = ParamSpec.from_module(model)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    with torch.no_grad():
        flat[spec.info("0.weight").start : spec.info("0.weight").start + 18] = 0.0  # the first filter
    for vectors in (False, True):
        direction = filter_normalised(spec, flat, torch.Generator().manual_seed(0), vectors=vectors)
        for item in spec:
            ours, own = item.view(direction), item.view(flat)
            if ours.ndim > 1:
                torch.testing.assert_close(ours.flatten(1).norm(dim=1), own.flatten(1).norm(dim=1))
            else:
                assert float(ours.norm()) == pytest.approx(float(own.norm()) if vectors else 0.0, rel=1e-5)


def test_sharpness_of_a_quadratic_and_its_scale_invariance():
    spec = ParamSpec.from_module(nn.Linear(3, 1, bias=False, dtype=torch.float64))
    flat = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    # L = |params|^2 with |u| = 5: ((flat + r u)^2 + (flat - r u)^2) / 2 - flat^2 = r^2 25, whatever the direction
    found = sharpness(lambda params: (params**2).sum(), flat, spec, radius=0.1, directions=4)
    assert found.mean == pytest.approx(0.25, abs=1e-12)
    assert found.sd == pytest.approx(0.0, abs=1e-12)
    # a loss that rescaled weights leave alone: filter normalisation makes the sharpness the same
    scaled = sharpness(lambda params: ((params / 7) ** 2).sum(), 7 * flat, spec, radius=0.1, directions=4)
    assert scaled.mean == pytest.approx(found.mean, rel=1e-9)


def test_surface_values_and_middle():
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    found = loss_surface(lambda p: p[0] ** 2 + 3 * p[1], torch.tensor([0.5, 1.0]), first, second, radius=2.0, points=5)
    assert found.alpha == (-2.0, -1.0, 0.0, 1.0, 2.0)
    for i, a in enumerate(found.alpha):
        for j, b in enumerate(found.beta):
            assert found.loss[i][j] == pytest.approx((0.5 + a) ** 2 + 3 * (1.0 + 2 * b))


def test_bad_arguments_are_one_line():
    spec = ParamSpec.from_module(nn.Linear(2, 1))
    flat = torch.ones(3)
    with pytest.raises(UserError, match="iterations=0"):
        hessian_eigenvalue(lambda p: p.sum(), flat, iterations=0)
    with pytest.raises(UserError, match="not finite"):
        hessian_eigenvalue(lambda p: (p * float("nan")).pow(2).sum(), flat)
    with pytest.raises(UserError, match="radius=0"):
        sharpness(lambda p: p.sum(), flat, spec, radius=0.0)
    with pytest.raises(UserError, match="points=4"):
        loss_surface(lambda p: p.sum(), flat, flat, flat, points=4)
    with pytest.raises(UserError, match="empty"):
        DatasetLoss(nn.Linear(2, 1), TensorDataset(torch.zeros(0, 2), torch.zeros(0)))
