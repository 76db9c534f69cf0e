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
    from fedcore.spec import ParamInfo, ParamSpec

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
    """

    def __init__(self, layers: Sequence[Linear | nn.Module], flattens: bool) -> None:
        self.layers, self._flattens = layers, flattens
        self._first = next(layer for layer in layers if isinstance(layer, Linear))
        self.draws = any(isinstance(layer, nn.Dropout) for layer in layers)

    @classmethod
    def of(cls, module: nn.Module, spec: ParamSpec) -> LinearChain | None:
        """The chain that ``module`` is, or None: nested ``Sequential`` of known layers, no hook, nothing frozen."""
        places = {id(module.get_parameter(item.name)): item for item in spec}
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
                layers.append(Linear(weight, bias))
            elif type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1):
                flattens = flattens or not _has_linear(layers)  # further on, hidden values are flat already
            elif type(layer) in (*ELEMENTWISE, nn.Dropout):
                layers.append(_not_in_place(layer))
            elif type(layer) is not nn.Identity:
                return None
        layers = [layer for layer in layers if not (isinstance(layer, nn.Dropout) and layer.p == 0)]
        return cls(layers, flattens) if _has_linear(layers) and not places else None

    def takes(self, inputs: object, stacked: bool = False) -> bool:
        """Whether ``inputs`` are vectors, or are flattened to vectors."""
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            return False
        dims = inputs.ndim - stacked
        return dims >= 2 if self._flattens else dims == 2

    def gradient(
        self, params: Tensor, inputs: Tensor, loss: Callable[[Tensor], tuple[Tensor, Tensor]], draw: Draw | None
    ) -> tuple[Tensor, Tensor]:
        """Gradient, new and of the shape of ``params``, and what ``loss`` says beside it.

        Args:
            params: (P,), or (clients, P).
            inputs: (B, ...), or (clients, B, ...).
            loss: outputs (..., B, d) -> their gradient and the losses.
            draw: of the dropout; None in eval mode.
        """
        hidden = inputs.flatten(params.ndim) if self._flattens else inputs
        flat = torch.empty_like(params)
        tape: list[Back] = []
        for layer in self.layers:
            if isinstance(layer, Linear):
                tape.append(partial(layer.backward, hidden, params, flat, layer is not self._first))
                hidden = layer.forward(hidden, params)
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


@dataclass(frozen=True)
class Linear:
    """A linear layer whose weight and bias lie in the flat vector.

    Args:
        weight: (out, in).
        bias: (out,), or none.
    """

    weight: ParamInfo
    bias: ParamInfo | None

    def forward(self, hidden: Tensor, params: Tensor) -> Tensor:
        """(..., B, in) -> (..., B, out)."""
        weight = _view(self.weight, params).mT
        if self.bias is None:
            return hidden @ weight
        bias = _view(self.bias, params)
        if params.ndim == 1:
            return torch.addmm(bias, hidden, weight)
        return torch.baddbmm(bias.unsqueeze(1), hidden, weight)

    def backward(self, hidden: Tensor, params: Tensor, flat: Tensor, further: bool, grad: Tensor) -> Tensor:
        """Write the gradients of weight and bias to ``flat``; returns that of ``hidden``, if asked for.

        Args:
            hidden: (..., B, in) input of the forward pass.
            params: (..., P).
            flat: (..., P), written.
            further: whether the gradient of ``hidden`` is needed; otherwise nothing is returned, (0,).
            grad: (..., B, out).
        """
        torch.matmul(grad.mT, hidden, out=_view(self.weight, flat))
        if self.bias is not None:
            torch.sum(grad, dim=-2, out=_view(self.bias, flat))
        return grad @ _view(self.weight, params) if further else grad.new_empty(0)


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
    logs = aten._log_softmax(outputs, 1, False)
    reduction = 1 if weights is None else 0
    losses, total = aten.nll_loss_forward(logs, targets, None, reduction, IGNORED)
    weights = torch.ones_like(losses) if weights is None else weights
    grad = aten.nll_loss_backward(weights, logs, targets, None, reduction, IGNORED, total)
    return aten._log_softmax_backward_data(grad, logs, 1, outputs.dtype), losses


def _view(info: ParamInfo, flat: Tensor) -> Tensor:
    """``info.view(flat)``; this is called so often that it counts."""
    part = flat.narrow(-1, info.start, info.stop - info.start)
    return part.view(info.shape) if flat.ndim == 1 else part.view(flat.shape[0], *info.shape)


def _through(before: Tensor, after: Tensor, grad: Tensor) -> Tensor:
    """Gradient at ``before`` from that at ``after``."""
    return torch.autograd.grad(after, before, grad)[0]


def _through_relu(after: Tensor, grad: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, after, 0.0)  # type: ignore[no-any-return]


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
