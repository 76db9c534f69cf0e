"""Gradients of one model at many parameter vectors at once, each on a batch of its own."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from polymodal.seeding import seed_global
from torch import Tensor, nn

from fedcore.chain import Linear, LinearChain, cross_entropy
from fedcore.engines.scratch import Scratch

if TYPE_CHECKING:
    from fedcore.spec import ParamSpec
    from fedcore.tasks import Task

__all__ = ["LinearStack", "StackedBatch", "StackedGradient", "Vmapped", "stacked_gradient"]


class StackedBatch(NamedTuple):
    """Batches of several clients.

    Args:
        inputs: (clients, B, ...); batches that are smaller repeat their first sample.
        targets: (clients, B, ...).
        weights: (clients, B), one over the size of the client's batch, 0 for repeated samples.
        sizes: samples of each batch.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    sizes: Sequence[int]


class StackedGradient(ABC):
    """Mean loss of each client and its gradient.

    Args:
        task: the model and its loss, which gives losses of single samples.
        spec: layout of its parameters.
    """

    how: ClassVar[str] = ""
    missing: tuple[tuple[int, int], ...] = ()
    """spans of the vector that never receive a gradient"""

    def __init__(self, task: Task, spec: ParamSpec) -> None:
        losses = task.sample_losses()
        assert losses is not None
        self.module, self.spec, self.sample_losses = task.module, spec, losses
        self.scratch = Scratch()

    @abstractmethod
    def __call__(self, params: Tensor, batch: StackedBatch, rng: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Gradients (clients, P), new, and losses (clients,).

        Args:
            params: (clients, P).
            batch: of these clients.
            rng: seed of each client's dropout draws; not used in eval mode.
        """


def stacked_gradient(task: Task, spec: ParamSpec) -> StackedGradient:
    """Matrix products for linear layers one after the other, ``torch.func.vmap`` for everything else."""
    chain = LinearChain.of(task.module, spec)
    if chain is not None:
        return LinearStack(task, spec, chain)
    return Vmapped(task, spec)


class Vmapped(StackedGradient):
    """Any model that ``torch.func`` can transform: no draws, no buffers that change, no branching on values."""

    how: ClassVar[str] = "torch.func.vmap"

    def __call__(self, params: Tensor, batch: StackedBatch, rng: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See ``StackedGradient``."""
        clients = len(batch.sizes)
        with warnings.catch_warnings():  # operations without a rule of their own run in a loop; slow, but right
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            grads, losses = torch.func.vmap(torch.func.grad_and_value(self._loss))(
                self.spec.unflatten(params), batch.inputs, batch.targets, batch.weights
            )
        out = self.scratch.empty(params.shape, params.dtype, params.device)
        torch.cat([grads[item.name].reshape(clients, -1) for item in self.spec], dim=1, out=out)
        return out, losses.detach()

    def _loss(self, parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        outputs = torch.func.functional_call(self.module, parameters, (inputs,))
        return (_per_sample(self.sample_losses(outputs, targets)) * weights).sum()


class LinearStack(StackedGradient):
    """Linear layers, elementwise functions and dropout, by products of stacks of matrices.

    Dropout draws what the model alone would draw.

    Args:
        task: the model and its loss.
        spec: layout of its parameters.
        chain: the model's layers.
    """

    how: ClassVar[str] = "stacked matrix products"

    def __init__(self, task: Task, spec: ParamSpec, chain: LinearChain) -> None:
        super().__init__(task, spec)
        self._chain = chain
        self._cross_entropy = task.output_loss() is F.cross_entropy

    def __call__(self, params: Tensor, batch: StackedBatch, rng: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See ``StackedGradient``."""
        if not self._chain.takes(batch.inputs, stacked=True):
            raise ValueError(f"a linear layer on inputs of shape {tuple(batch.inputs.shape[2:])}")
        draw = None
        if self._chain.draws and self.module.training:
            masks = self._masks(batch, rng)
            draw = lambda hidden, p: masks.pop(0)  # noqa: E731
        out = self.scratch.empty(params.shape, params.dtype, params.device)
        return self._chain.gradient(params, batch.inputs, lambda outputs: self._loss(outputs, batch), draw, out)

    def _loss(self, outputs: Tensor, batch: StackedBatch) -> tuple[Tensor, Tensor]:
        """Gradient of the losses at ``outputs`` (clients, B, d), and the losses (clients,)."""
        clients = outputs.shape[:2]
        outputs, targets = outputs.flatten(0, 1), batch.targets.flatten(0, 1)
        weights = batch.weights.to(outputs.dtype)
        if self._cross_entropy and targets.dtype == torch.int64 and targets.ndim == 1:
            grad, losses = cross_entropy(outputs, targets, weights.reshape(-1))
        else:
            outputs.requires_grad_()
            with torch.enable_grad():
                losses = _per_sample(self.sample_losses(outputs, targets))
            (grad,) = torch.autograd.grad(losses, outputs, weights.reshape(-1))
        return grad.view(*clients, -1), (losses.detach().view(clients) * weights).sum(dim=1)

    def _masks(self, batch: StackedBatch, rng: Sequence[int]) -> list[Tensor]:
        """What each dropout layer multiplies with, (clients, B, d)."""
        clients, size = batch.targets.shape[:2]
        width = batch.inputs[0, 0].numel()
        found: list[tuple[Tensor, float]] = []
        for layer in self._chain.layers:
            if isinstance(layer, Linear):
                width = layer.width
            elif isinstance(layer, nn.Dropout):
                found.append((batch.inputs.new_ones(clients, size, width), layer.p))
        for i in range(clients):
            seed_global(rng[i])
            for mask, p in found:
                rows = mask[i, : batch.sizes[i]]
                rows.copy_(torch.dropout(torch.ones_like(rows), p, True))
        return [mask for mask, _ in found]


def _per_sample(losses: Tensor) -> Tensor:
    """(B, ...) -> (B,), the mean over what is not the batch."""
    return losses if losses.ndim == 1 else losses.flatten(1).mean(dim=1)
