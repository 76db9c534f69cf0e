"""How flat a minimum is: largest Hessian eigenvalue, filter-normalised sharpness, a 2-D surface of the loss.

Everything works on a loss over a flat vector, ``loss(params (P,)) -> scalar``: a closure, or a ``DatasetLoss``, which
is the mean loss of a model over a data set and is differentiated batch by batch, so that memory does not grow with the
data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from polymodal.errors import UserError
from polymodal.seeding import generator, seed_global
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedcore.batches import ClientData
from fedcore.spec import ParamSpec
from fedcore.tasks import as_task

__all__ = [
    "DatasetLoss",
    "Eigenvalue",
    "LossFn",
    "Sharpness",
    "Surface",
    "filter_normalised",
    "hessian_eigenvalue",
    "hessian_product",
    "loss_surface",
    "sharpness",
]

LossFn = Callable[[Tensor], Tensor]
"""``loss(params (P,)) -> scalar``, twice differentiable for the Hessian."""


class DatasetLoss:
    """Mean loss of a model over a data set as a function of its flat parameters, in eval mode.

    Evaluation draws nothing: dropout is off and running statistics are used, not moved. The module is left as it was.

    Args:
        model: a module with ``loss`` on its outputs, or a ``polymodal.TaskModule``, which brings its own.
        dataset: as client data: a ``TensorDataset``, an object with ``batch(indices, generator)``, or map-style.
        loss: ``loss(outputs, targets) -> mean over the batch``.
        batch_size: samples of a forward pass.

    Attributes:
        spec: layout of the flat vector.
        flat: (P,) copy of the model's parameters.

    Raises:
        UserError: an empty data set.
    """

    def __init__(
        self,
        model: Any,
        dataset: Any,
        loss: Callable[[Tensor, Any], Tensor] = nn.functional.cross_entropy,
        batch_size: int = 500,
    ) -> None:
        self._data, self._batch_size = ClientData(dataset), batch_size
        if not len(self._data):
            raise UserError("the data set to measure the loss on is empty")
        self._call = _LossModule(as_task(model, loss))
        module = self._call.task.module
        self.spec = ParamSpec.from_module(module)
        self.flat = self.spec.flatten({item.name: module.get_parameter(item.name).detach() for item in self.spec})
        self._here = partial(_move, device=self.flat.device)

    def parts(self) -> Iterable[tuple[float, LossFn]]:
        """Weight and loss of each batch; the weighted sum is the mean over the data set."""
        draw = generator(0, "landscape") if self._data.augments else None
        for index in torch.split(torch.arange(len(self._data)), self._batch_size):
            yield (
                len(index) / len(self._data),
                partial(self._batch_loss, batch=self._here(self._data.batch(index, draw))),
            )

    def _batch_loss(self, params: Tensor, batch: Any) -> Tensor:
        named = {f"module.{item.name}": item.view(params) for item in self.spec}
        training = self._call.module.training
        self._call.module.eval()
        seed_global(0)
        try:
            return functional_call(self._call, named, (batch,))  # type: ignore[no-any-return]
        finally:
            self._call.module.train(training)

    def __call__(self, params: Tensor) -> Tensor:
        """Mean loss (scalar) at ``params`` (P,), with gradient where ``params`` asks for one."""
        total = params.new_zeros(())
        for weight, part in self.parts():
            total = total + weight * part(params)
        return total


def _move(batch: Any, device: torch.device) -> Any:
    if device.type == "cpu":
        return batch
    from lightning.fabric.utilities import move_data_to_device

    return move_data_to_device(batch, device)


class _LossModule(nn.Module):
    """A task whose loss is its forward pass, so that ``functional_call`` can exchange the parameters under it."""

    def __init__(self, task: Any) -> None:
        super().__init__()
        self.task, self.module = task, task.module

    def forward(self, batch: Any) -> Tensor:
        return self.task.loss(batch, 0)  # type: ignore[no-any-return]


def _parts(loss: LossFn) -> Iterable[tuple[float, LossFn]]:
    return loss.parts() if isinstance(loss, DatasetLoss) else [(1.0, loss)]


def _plain_attention() -> AbstractContextManager[None]:
    """The attention kernel that can be differentiated twice."""
    return sdpa_kernel(SDPBackend.MATH)


# ------------------------------------------------------------------ Hessian


def hessian_product(loss: LossFn, params: Tensor, vector: Tensor) -> Tensor:
    """Product (P,) of the Hessian of ``loss`` at ``params`` (P,) with ``vector`` (P,), by differentiating twice."""
    product = torch.zeros_like(params)
    with _plain_attention():
        for weight, part in _parts(loss):
            point = params.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(part(point), point, create_graph=True)
            if gradient.requires_grad:  # a loss that is linear in the parameters has no second derivative
                (second,) = torch.autograd.grad(gradient @ vector, point)
                product.add_(second, alpha=weight)
    return product


@dataclass(frozen=True)
class Eigenvalue:
    """A Hessian eigenvalue and how well it is known.

    Args:
        value: Rayleigh quotient of ``vector``.
        residual: ``||H v - value v||``; for a symmetric matrix an eigenvalue lies within it around ``value``.
        iterations: Hessian products used.
        converged: whether ``residual`` is below the tolerance times ``|value|``.
        vector: (P,) unit vector.
    """

    value: float
    residual: float
    iterations: int
    converged: bool
    vector: Tensor


def hessian_eigenvalue(
    loss: LossFn, params: Tensor, *, iterations: int = 200, tolerance: float = 1e-3, seed: int = 0
) -> Eigenvalue:
    """Largest (most positive) eigenvalue of the Hessian at ``params`` by power iteration.

    Power iteration finds the eigenvalue that is largest in absolute value. Where that one is negative, as between
    minima, the Hessian is shifted by it and the iteration repeated, so that the result is the largest one all the same.

    Args:
        loss: the loss.
        params: (P,) where to measure.
        iterations: most Hessian products of each of the two passes.
        tolerance: largest residual, as a share of the eigenvalue; the value itself is then known much better, with an
            error of the order of the residual's square over the gap to the next eigenvalue.
        seed: of the random start.

    Returns:
        The eigenvalue with its residual; ``converged`` is false where the products ran out first.

    Raises:
        UserError: fewer than one iteration, a tolerance that is not positive, or a loss that is not finite at
            ``params``.
    """
    if iterations < 1 or not tolerance > 0:
        raise UserError(f"iterations={iterations}, tolerance={tolerance}; expected at least 1 and more than 0")
    start = torch.randn(params.numel(), generator=generator(seed, "power iteration"), dtype=torch.float64).to(params)
    found = _power(loss, params, start, 0.0, iterations, tolerance)
    if found.value >= 0:
        return found
    shifted = _power(loss, params, start, found.value, iterations, tolerance)
    return Eigenvalue(
        shifted.value,
        shifted.residual,
        found.iterations + shifted.iterations,
        shifted.converged,
        shifted.vector,
    )


def _power(loss: LossFn, params: Tensor, start: Tensor, shift: float, iterations: int, tolerance: float) -> Eigenvalue:
    """Power iteration on ``H - shift I``; value and residual are those of H."""
    vector = start / start.norm()
    value = residual = 0.0
    for step in range(1, iterations + 1):
        product = hessian_product(loss, params, vector)
        value = float(vector @ product)
        residual = float((product - value * vector).norm())
        if not math.isfinite(residual):
            raise UserError("the loss or its derivatives are not finite here; no Hessian eigenvalue")
        if residual <= tolerance * abs(value):
            return Eigenvalue(value, residual, step, True, vector)
        moved = product - shift * vector
        if step < iterations:
            vector = moved / moved.norm()
    return Eigenvalue(value, residual, iterations, False, vector)


# ------------------------------------------------------------------ sharpness and surface


def filter_normalised(spec: ParamSpec, params: Tensor, draw: torch.Generator, *, vectors: bool = False) -> Tensor:
    """A random direction (P,) whose every filter is as long as the parameters' filter.

    Without that, a network whose layers are rescaled (which ReLU hides from the loss) would look flatter. A filter is
    a row along the first dimension; Source: Li et al., "Visualizing the Loss Landscape of Neural Nets", section 4.

    Args:
        spec: layout of the parameters.
        params: (P,) parameters.
        draw: CPU generator of the Gaussian draws.
        vectors: include biases and normalisation weights, each as one filter; Li et al. leave them where they are.
    """
    direction = torch.randn(params.numel(), generator=draw, dtype=torch.float64).to(params)
    for item in spec:
        part, own = item.view(direction), item.view(params)
        if part.ndim < 2:
            rows, own_rows = part.reshape(1, -1), own.reshape(1, -1)
            scale = own_rows.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True) if vectors else 0.0
        else:
            rows, own_rows = part.flatten(1), own.flatten(1)
            scale = own_rows.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True)
        direction[item.start : item.stop] = (rows * scale).reshape(-1)
    return direction


@dataclass(frozen=True)
class Sharpness:
    """Mean rise of the loss in random directions.

    Args:
        mean: over directions, of ``(L(theta + r u) + L(theta - r u)) / 2 - L(theta)``.
        sd: sample standard deviation over directions (0 for one).
        radius: r.
        values: one for each direction.
    """

    mean: float
    sd: float
    radius: float
    values: tuple[float, ...]


def sharpness(
    loss: LossFn,
    params: Tensor,
    spec: ParamSpec,
    *,
    radius: float = 0.1,
    directions: int = 20,
    seed: int = 0,
    vectors: bool = False,
) -> Sharpness:
    """``E_u[L(theta + r u) - L(theta)]`` over random filter-normalised ``u``.

    Each direction is used forth and back, which has the same mean and takes the gradient out of the noise.

    Args:
        loss: the loss.
        params: (P,) theta.
        spec: layout of the parameters.
        radius: r, as a share of each filter's length.
        directions: number of random directions.
        seed: of the directions: the same ones for all models of one layout, up to each model's own filter lengths.
        vectors: as in ``filter_normalised``.

    Raises:
        UserError: a radius that is not positive, or no direction.
    """
    if not radius > 0 or directions < 1:
        raise UserError(f"radius={radius}, directions={directions}; expected a radius above 0 and at least 1 direction")
    draw, values = generator(seed, "sharpness"), []
    with torch.no_grad():
        base = float(loss(params))
        for _ in range(directions):
            step = radius * filter_normalised(spec, params, draw, vectors=vectors)
            values.append((float(loss(params + step)) + float(loss(params - step))) / 2 - base)
    mean = sum(values) / directions
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / max(directions - 1, 1))
    return Sharpness(mean, sd, radius, tuple(values))


@dataclass(frozen=True)
class Surface:
    """The loss over a plane through the parameters.

    Args:
        alpha: (n,) coordinates along the first direction, 0 in the middle.
        beta: (n,) along the second.
        loss: (n, n) loss at ``theta + alpha[i] u + beta[j] v``, index [i][j].
    """

    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]


def loss_surface(
    loss: LossFn, params: Tensor, first: Tensor, second: Tensor, *, radius: float = 1.0, points: int = 21
) -> Surface:
    """Loss on a square grid along two directions, such as two of ``filter_normalised``.

    Args:
        loss: the loss.
        params: (P,) the middle.
        first: (P,) u.
        second: (P,) v.
        radius: the grid spans -radius..radius in both.
        points: grid points a side; odd, so that the middle is one of them.

    Raises:
        UserError: a radius that is not positive, or an even number of points or fewer than 3.
    """
    if not radius > 0 or points < 3 or points % 2 == 0:
        raise UserError(f"radius={radius}, points={points}; expected a radius above 0 and an odd number from 3")
    half = points // 2
    grid = tuple(radius * (i - half) / half for i in range(points))
    with torch.no_grad():
        rows = tuple(tuple(float(loss(params + a * first + b * second)) for b in grid) for a in grid)
    return Surface(grid, grid, rows)
