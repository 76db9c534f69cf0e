"""Gradients of one model at many parameter vectors at once, each on a batch of its own."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from polymodal.seeding import seed_global
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedcore.spec import ParamInfo, ParamSpec

__all__ = ["LinearStack", "StackedBatch", "StackedGradient", "Vmapped", "stacked_gradient"]

SampleLosses = Callable[[Tensor, Tensor], Tensor]

ELEMENTWISE = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.ReLU6,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Softsign,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Tanh,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardswish,
)


class StackedBatch(NamedTuple):
    """Batches of several clients.

    Args:
        inputs: (clients, B, ...); batches that are smaller repeat their first sample.
        targets: (clients, B, ...).
        weights: (clients, B), one over the size of the client's batch, 0 for repeated samples; (1, 1) where all
            batches have B samples.
        sizes: samples of each batch.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    sizes: Sequence[int]


class StackedGradient(ABC):
    """Mean loss of each client and its gradient.

    Args:
        module: the model.
        spec: layout of its parameters.
        sample_losses: ``(outputs, targets) -> loss of each sample``, of any shape that begins with the samples.
    """

    how: ClassVar[str] = ""
    missing: tuple[tuple[int, int], ...] = ()
    """spans of the vector that never receive a gradient"""

    def __init__(self, module: nn.Module, spec: ParamSpec, sample_losses: SampleLosses) -> None:
        self.module, self.spec, self.sample_losses = module, spec, sample_losses

    @abstractmethod
    def __call__(self, params: Tensor, batch: StackedBatch, rng: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Gradients (clients, P), new, and losses (clients,).

        Args:
            params: (clients, P).
            batch: of these clients.
            rng: seed of each client's dropout draws; not used in eval mode.
        """


def stacked_gradient(module: nn.Module, spec: ParamSpec, sample_losses: SampleLosses) -> StackedGradient:
    """Matrix products for linear layers one after the other, ``torch.func.vmap`` for everything else."""
    layers = _linear_layers(module, spec)
    if layers is not None:
        return LinearStack(module, spec, sample_losses, layers)
    return Vmapped(module, spec, sample_losses)


class Vmapped(StackedGradient):
    """Any model that ``torch.func`` can transform: no draws, no buffers that change, no branching on values."""

    how: ClassVar[str] = "torch.func.vmap"

    def __call__(self, params: Tensor, batch: StackedBatch, rng: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See ``StackedGradient``."""
        clients, size = batch.targets.shape[:2]
        with warnings.catch_warnings():  # operations without a rule of their own run in a loop; slow, but right
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            grads, losses = torch.func.vmap(torch.func.grad_and_value(self._loss))(
                self.spec.unflatten(params), batch.inputs, batch.targets, batch.weights.expand(clients, size)
            )
        return torch.cat([grads[item.name].reshape(clients, -1) for item in self.spec], dim=1), losses.detach()

    def _loss(self, parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        outputs = torch.func.functional_call(self.module, parameters, (inputs,))
        return (_per_sample(self.sample_losses(outputs, targets)) * weights).sum()


class LinearStack(StackedGradient):
    """Linear layers, elementwise functions and dropout, one after the other, by products of stacks of matrices.

    Gradients are written straight to their place in the flat vectors. Dropout draws what the model alone would draw.

    Args:
        module: the model.
        spec: layout of its parameters.
        sample_losses: loss of each sample.
        layers: of the model, in order; at least one is ``Linear``.
    """

    how: ClassVar[str] = "stacked matrix products"

    def __init__(
        self, module: nn.Module, spec: ParamSpec, sample_losses: SampleLosses, layers: list[Linear | nn.Module]
    ) -> None:
        super().__init__(module, spec, sample_losses)
        self._layers = [layer for layer in layers if not isinstance(layer, (nn.Flatten, nn.Identity))]
        self._flattens = any(isinstance(layer, nn.Flatten) for layer in layers)
        self._first = next(layer for layer in layers if isinstance(layer, Linear))
        self._draws = any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in layers)

    def __call__(self, params: Tensor, batch: StackedBatch, rng: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See ``StackedGradient``."""
        hidden = batch.inputs.flatten(2) if self._flattens else batch.inputs
        if hidden.ndim != 3:
            raise ValueError(f"a linear layer on inputs of shape {tuple(hidden.shape[2:])}")
        noise = self._noise(hidden, batch.sizes, rng) if self._draws and self.module.training else []
        flat = torch.empty_like(params)
        tape: list[Callable[[Tensor], Tensor]] = []
        for layer in self._layers:
            if isinstance(layer, Linear):
                tape.append(partial(layer.backward, hidden, params, flat, layer is not self._first))
                hidden = layer.forward(hidden, params)
            elif not isinstance(layer, nn.Dropout):
                before = hidden.detach().requires_grad_()
                with torch.enable_grad():
                    after = layer(before)
                tape.append(partial(_through, before, after))
                hidden = after.detach()
            elif noise and layer.p > 0:
                mask = noise.pop(0)
                tape.append(mask.mul)
                hidden = hidden * mask
        grad, losses = self._loss(hidden, batch)
        while grad.numel():
            grad = tape.pop()(grad)
        return flat, losses

    def _loss(self, outputs: Tensor, batch: StackedBatch) -> tuple[Tensor, Tensor]:
        """Gradient of the losses at ``outputs`` (clients, B, d), and the losses (clients,)."""
        outputs.requires_grad_()
        with torch.enable_grad():
            losses = _per_sample(self.sample_losses(outputs.flatten(0, 1), batch.targets.flatten(0, 1)))
            total = (losses.reshape(outputs.shape[:2]) * batch.weights).sum(dim=1)
        (grad,) = torch.autograd.grad(total.sum(), outputs)
        return grad, total.detach()

    def _noise(self, hidden: Tensor, sizes: Sequence[int], rng: Sequence[int]) -> list[Tensor]:
        """What each dropout layer multiplies with, (clients, B, d): one over the rate of survivors, or zero."""
        clients, size, width = hidden.shape
        widths: list[tuple[int, float]] = []
        for layer in self._layers:
            if isinstance(layer, Linear):
                width = layer.weight.shape[0]
            elif isinstance(layer, nn.Dropout) and layer.p > 0:
                widths.append((width, layer.p))
        found = [hidden.new_ones(clients, size, width) for width, _ in widths]
        for i in range(clients):
            seed_global(rng[i])
            for mask, (width, p) in zip(found, widths, strict=True):
                mask[i, : sizes[i]] = torch.dropout(hidden.new_ones(sizes[i], width), p, True)
        return found


@dataclass(frozen=True)
class Linear:
    """A linear layer whose weight and bias lie in the flat vectors.

    Args:
        weight: (out, in).
        bias: (out,), or none.
    """

    weight: ParamInfo
    bias: ParamInfo | None

    def forward(self, hidden: Tensor, params: Tensor) -> Tensor:
        """(clients, B, in) -> (clients, B, out)."""
        weight = self.weight.view(params).mT
        if self.bias is None:
            return torch.bmm(hidden, weight)
        return torch.baddbmm(self.bias.view(params).unsqueeze(1), hidden, weight)

    def backward(self, hidden: Tensor, params: Tensor, flat: Tensor, further: bool, grad: Tensor) -> Tensor:
        """Write the gradients of weight and bias to ``flat`` (clients, P); returns that of ``hidden``, if asked for.

        Args:
            hidden: (clients, B, in) input of the forward pass.
            params: (clients, P).
            flat: (clients, P), written.
            further: whether the gradient of ``hidden`` is needed; otherwise nothing is returned, (0,).
            grad: (clients, B, out).
        """
        torch.bmm(grad.mT, hidden, out=self.weight.view(flat))
        if self.bias is not None:
            torch.sum(grad, dim=1, out=self.bias.view(flat))
        return torch.bmm(grad, self.weight.view(params)) if further else grad.new_empty(0)


def _through(before: Tensor, after: Tensor, grad: Tensor) -> Tensor:
    """Gradient at ``before`` from that at ``after``."""
    return torch.autograd.grad(after, before, grad)[0]


def _per_sample(losses: Tensor) -> Tensor:
    """(B, ...) -> (B,), the mean over what is not the batch."""
    return losses if losses.ndim == 1 else losses.flatten(1).mean(dim=1)


def _linear_layers(module: nn.Module, spec: ParamSpec) -> list[Linear | nn.Module] | None:
    """The layers of ``module``, where it is a plain chain of layers that ``LinearStack`` knows."""
    places = {id(module.get_parameter(item.name)): item for item in spec}
    layers: list[Linear | nn.Module] = []
    for layer in _chain(module):
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
            return None
        if type(layer) is nn.Linear:
            weight = places.pop(id(layer.weight), None)
            bias = None if layer.bias is None else places.pop(id(layer.bias), None)
            if weight is None or (layer.bias is not None and bias is None):  # frozen, or used twice
                return None
            layers.append(Linear(weight, bias))
        elif type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1) and not _has_linear(layers):
            layers.append(layer)
        elif type(layer) in (*ELEMENTWISE, nn.Dropout, nn.Identity):
            layers.append(_not_in_place(layer))
        else:
            return None
    return layers if _has_linear(layers) and not places else None


def _not_in_place(layer: nn.Module) -> nn.Module:
    layer = copy.copy(layer)
    if hasattr(layer, "inplace"):
        layer.__dict__["inplace"] = False
    return layer


def _has_linear(layers: Sequence[object]) -> bool:
    return any(isinstance(layer, Linear) for layer in layers)


def _chain(module: nn.Module) -> list[nn.Module]:
    """Layers of nested ``Sequential``, in order; the module itself where it is none."""
    plain = (
        type(module).forward is nn.Sequential.forward and not module._forward_hooks and not module._forward_pre_hooks
    )
    return [layer for child in module for layer in _chain(child)] if plain else [module]  # type: ignore[attr-defined]
