"""Gradients of chains of linear layers by hand: for one parameter vector, or for a stack of them in the same calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedcore.spec import ParamSpec

__all__ = ["Linear", "LinearChain", "cross_entropy"]

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

IGNORED = -100
"""targets that ``F.cross_entropy`` leaves out"""
_NOTHING = torch.empty(0)
Back = Callable[[Tensor], Tensor]
Draw = Callable[[Tensor, float], Tensor]
"""``draw(hidden, p)``: what dropout multiplies ``hidden`` with, 0 or ``1 / (1 - p)``."""


class LinearChain:
    """Linear layers, elementwise functions and dropout, one after the other.

    Gradients are written straight to their place in the flat vector, which automatic differentiation cannot do: for
    small models, the copy that is saved takes a tenth of the step.

    Args:
        layers: in order; at least one is ``Linear``.
        flattens: whether inputs are flattened first.
        spec: layout of the vector; all of it belongs to these layers.
    """

    def __init__(self, layers: Sequence[Linear | nn.Module], flattens: bool, spec: ParamSpec) -> None:
        self.layers, self._flattens = layers, flattens
        self._sizes, self._shapes = [item.numel for item in spec], [item.shape for item in spec]
        self._first = next(layer for layer in layers if isinstance(layer, Linear))
        self.draws = any(isinstance(layer, nn.Dropout) for layer in layers)

    @classmethod
    def of(cls, module: nn.Module, spec: ParamSpec) -> LinearChain | None:
        """The chain that ``module`` is, or None: nested ``Sequential`` of known layers, no hook, nothing frozen."""
        places = {id(module.get_parameter(item.name)): i for i, item in enumerate(spec)}
        layers: list[Linear | nn.Module] = []
        flattens = False
        for layer in _leaves(module):
            if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
                return None
            if type(layer) is nn.Linear:
                weight = places.pop(id(layer.weight), None)
                bias = None if layer.bias is None else places.pop(id(layer.bias), None)
                if weight is None or (layer.bias is not None and bias is None):  # frozen, or used twice
                    return None
                layers.append(Linear(weight, bias, layer.out_features))
            elif type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1):
                flattens = flattens or not _has_linear(layers)  # further on, hidden values are flat already
            elif type(layer) in (*ELEMENTWISE, nn.Dropout):
                layers.append(_not_in_place(layer))
            elif type(layer) is not nn.Identity:
                return None
        layers = [layer for layer in layers if not (isinstance(layer, nn.Dropout) and layer.p == 0)]
        return cls(layers, flattens, spec) if _has_linear(layers) and not places else None

    def takes(self, inputs: object, stacked: bool = False) -> bool:
        """Whether ``inputs`` are vectors, or are flattened to vectors."""
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            return False
        dims = inputs.ndim - stacked
        return dims >= 2 if self._flattens else dims == 2

    def gradient(
        self,
        params: Tensor,
        inputs: Tensor,
        loss: Callable[[Tensor], tuple[Tensor, Tensor]],
        draw: Draw | None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gradient, of the shape of ``params``, and what ``loss`` says beside it.

        Args:
            params: (P,), or (clients, P).
            inputs: (B, ...), or (clients, B, ...).
            loss: outputs (..., B, d) -> their gradient and the losses.
            draw: of the dropout; None in eval mode.
            out: where the gradient is written (default: a new tensor).
        """
        hidden = inputs.flatten(params.ndim) if self._flattens else inputs
        flat = torch.empty_like(params) if out is None else out
        values, grads = self._views(params), self._views(flat)
        tape: list[Back] = []
        for layer in self.layers:
            if isinstance(layer, Linear):
                tape.append(partial(layer.backward, hidden, values, grads, layer is not self._first))
                hidden = layer.forward(hidden, values)
            elif isinstance(layer, nn.Dropout):
                if draw is not None:
                    mask = draw(hidden, layer.p)
                    tape.append(mask.mul)
                    hidden = hidden * mask
            elif type(layer) is nn.ReLU:
                hidden = hidden.relu()
                tape.append(partial(_through_relu, hidden))
            else:
                before = hidden.detach().requires_grad_()
                with torch.enable_grad():
                    after = layer(before)
                tape.append(partial(_through, before, after))
                hidden = after.detach()
        grad, losses = loss(hidden)
        while grad.numel():
            grad = tape.pop()(grad)
        return flat, losses

    def _views(self, flat: Tensor) -> list[Tensor]:
        """All tensors of a flat vector, in one call as far as possible: this is done twice a step."""
        parts, clients = flat.split_with_sizes(self._sizes, -1), flat.shape[:-1]
        return [part.view(*clients, *shape) for part, shape in zip(parts, self._shapes, strict=True)]


@dataclass(frozen=True)
class Linear:
    """A linear layer whose weight and bias lie in the flat vector.

    Args:
        weight: which tensor of the vector is the weight (..., out, in).
        bias: which one is the bias (..., out), or none.
        width: outputs.
    """

    weight: int
    bias: int | None
    width: int

    def forward(self, hidden: Tensor, values: Sequence[Tensor]) -> Tensor:
        """(..., B, in) -> (..., B, out)."""
        weight = values[self.weight].mT
        if self.bias is None:
            return hidden @ weight
        bias = values[self.bias]
        return torch.addmm(bias, hidden, weight) if bias.ndim == 1 else torch.baddbmm(bias.unsqueeze(1), hidden, weight)

    def backward(
        self, hidden: Tensor, values: Sequence[Tensor], grads: Sequence[Tensor], further: bool, grad: Tensor
    ) -> Tensor:
        """Write the gradients of weight and bias; returns that of ``hidden``, if asked for.

        Args:
            hidden: (..., B, in) input of the forward pass.
            values: all tensors of the vector.
            grads: their gradients, written.
            further: whether the gradient of ``hidden`` is needed; otherwise nothing is returned, (0,).
            grad: (..., B, out).
        """
        torch.matmul(grad.mT, hidden, out=grads[self.weight])
        if self.bias is not None:
            torch.sum(grad, dim=-2, out=grads[self.bias])
        return grad @ values[self.weight] if further else _NOTHING


def cross_entropy(outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradient and value of ``F.cross_entropy``, by its own kernels without a graph around them.

    Args:
        outputs: (N, classes).
        targets: (N,) class numbers.
        weights: (N,) what each loss counts; None is the mean.

    Returns:
        Gradient (N, classes); the mean loss, or with ``weights`` the losses (N,).
    """
    aten = torch.ops.aten
    logs = outputs.log_softmax(1)
    reduction = 1 if weights is None else 0
    losses, total = aten.nll_loss_forward.default(logs, targets, None, reduction, IGNORED)
    weights = torch.ones_like(losses) if weights is None else weights
    grad = aten.nll_loss_backward.default(weights, logs, targets, None, reduction, IGNORED, total)
    return aten._log_softmax_backward_data.default(grad, logs, 1, outputs.dtype), losses


def _through(before: Tensor, after: Tensor, grad: Tensor) -> Tensor:
    """Gradient at ``before`` from that at ``after``."""
    return torch.autograd.grad(after, before, grad)[0]


def _through_relu(after: Tensor, grad: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward.default(grad, after, 0.0)  # type: ignore[no-any-return]


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Layers of nested ``Sequential``, in order; the module itself where it is none."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not hooked:
        for child in module:
            yield from _leaves(child)
    else:
        yield module


def _not_in_place(layer: nn.Module) -> nn.Module:
    layer = copy.copy(layer)
    if hasattr(layer, "inplace"):
        layer.__dict__["inplace"] = False
    return layer


def _has_linear(layers: Sequence[object]) -> bool:
    return any(isinstance(layer, Linear) for layer in layers)
