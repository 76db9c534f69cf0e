"""A model whose trainable parameters are views of whichever flat vector it is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from polymodal.errors import UserError
from polymodal.seeding import seed_global
from torch import Tensor

from fedcore.batches import ClientData
from fedcore.chain import LinearChain, cross_entropy
from fedcore.spec import ParamSpec
from fedcore.tasks import Task

__all__ = ["Learner", "first_batches"]

EVAL_BATCH = 500
"""samples of a forward pass without gradient"""
TOLERANCE = {torch.float32: (1e-3, 1e-5), torch.float64: (1e-9, 1e-12)}
"""relative and absolute, between two ways to compute a gradient"""


class Learner:
    """Gradients and metrics of one task as functions of a flat parameter vector.

    The module's parameters are pointed at the vector instead of being copied into, so one model serves all clients.

    Args:
        task: what is trained.

    Attributes:
        spec: layout of the vector.
        start: (P,) copy of the parameters that the module came with.
        missing: spans of the vector that received no gradient in the last call.

    Raises:
        UserError: no trainable parameter, or trainable parameters of several number formats.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        try:
            self.spec = ParamSpec.from_module(task.module)
        except ValueError as error:
            raise UserError(f"{type(task.module).__name__} cannot be trained: {error}") from error
        self._parameters = [task.module.get_parameter(item.name) for item in self.spec]
        with torch.no_grad():
            self.start = torch.cat([p.detach().reshape(-1) for p in self._parameters])
        self._pointed = self.start
        self._point(self.start.clone())
        self.device = self.start.device
        self._buffers = [(name, b) for name, b in task.module.named_buffers() if b is not None]
        self.missing: tuple[tuple[int, int], ...] = ()
        self._base: dict[str, Tensor] | None = None
        self._shifted: tuple[str, ...] = ()
        self._chain: LinearChain | None = None
        self._output_loss: Any = task.output_loss()
        task.module.train()

    # ------------------------------------------------------------------ parameters and buffers

    def _point(self, params: Tensor) -> None:
        """Make the module's parameters views of ``params`` (P,)."""
        if params.data_ptr() == self._pointed.data_ptr():
            return
        for item, parameter in zip(self.spec, self._parameters, strict=True):
            parameter.data = params[item.start : item.stop].view(item.shape)
        self._pointed = params

    def _here(self, batch: Any) -> Any:
        """The batch on the model's device."""
        if self.device.type == "cpu":
            return batch
        from lightning.fabric.utilities import move_data_to_device

        return move_data_to_device(batch, self.device)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Copies of the module's buffers by name."""
        return {name: buffer.clone() for name, buffer in self._buffers}

    def load_buffers(self, values: dict[str, Tensor]) -> None:
        """Set the module's buffers."""
        for name, buffer in self._buffers:
            buffer.copy_(values[name])

    def keep_base(self) -> None:
        """Remember the frozen weights as they are now; what ``shift`` adds is added to these."""
        names = [name for name, p in self.task.module.named_parameters() if not p.requires_grad]
        self._base = {name: self.task.module.get_parameter(name).detach().clone() for name in names}

    def shift(self, tree: dict[str, Tensor]) -> None:
        """Add ``tree`` to the frozen weights that ``keep_base`` found, by name; others become what they were.

        Raises:
            UserError: not the name of a frozen weight.
        """
        assert self._base is not None, "keep_base comes first"
        unknown = sorted(set(tree) - set(self._base))
        if unknown:
            raise UserError(f"{unknown[0]} is no frozen weight of {type(self.task.module).__name__}")
        for name in {*self._shifted, *tree}:
            value = self._base[name]
            if name in tree:
                value = value + tree[name].to(value)
            self.task.module.get_parameter(name).data = value.clone() if value is self._base[name] else value
        self._shifted = tuple(tree)

    def export(self, params: Tensor) -> None:
        """Give the module its own copy of ``params``, for use outside."""
        self._point(params.clone())

    def check(self, batch: Any) -> None:
        """One gradient on a batch, with buffers left as they were; raises what the model raises.

        From then on, gradients of chains of linear layers are computed by hand, if that gives the same one.
        """
        self._chain = None
        chain, batch, params = LinearChain.of(self.task.module, self.spec), self._here(batch), self._pointed
        expected, _ = self(params, batch, rng=0, update_buffers=False)
        if chain is None or self._buffers or not self.loss_is_pure(batch) or not chain.takes(batch[0]):
            return
        self._chain = chain
        found, _ = self(params, batch, rng=0)
        if not torch.allclose(found, expected, *TOLERANCE.get(found.dtype, (0.05, 0.01))):
            self._chain = None

    def loss_is_pure(self, batch: Any) -> bool:
        """Whether the loss of a batch ``(inputs, targets)`` depends on the parameters through the outputs alone."""
        loss = self.task.output_loss()
        if loss is None or not isinstance(batch, (tuple, list)) or len(batch) != 2:
            return False
        with torch.no_grad():
            outputs = self.task.module(batch[0])
        if not isinstance(outputs, Tensor):
            return False
        with torch.enable_grad():
            value = loss(outputs.requires_grad_(), batch[1])
        grads = torch.autograd.grad(value, [outputs, *self._parameters], allow_unused=True)
        return all(grad is None for grad in grads[1:])

    # ------------------------------------------------------------------ gradients

    def __call__(self, params: Tensor, batch: Any, *, rng: int, update_buffers: bool = True) -> tuple[Tensor, Tensor]:
        """Gradient (P,) and mean loss of a batch; see ``fedcore.algorithm.GradFn``."""
        if self._chain is not None and self._chain.takes(batch[0]):
            return self._by_hand(self._chain, params, self._here(batch), rng)
        self._point(params)
        seed_global(rng)
        batch = self._here(batch)
        kept = None if update_buffers or not self._buffers else self.buffers
        loss = self.task.loss(batch, rng)
        grads = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        if kept is not None:
            self.load_buffers(kept)
        if None in grads:
            pairs = list(zip(self.spec, grads, strict=True))
            self.missing = tuple((item.start, item.stop) for item, grad in pairs if grad is None)
            return torch.cat([_flat(item.numel, grad, params) for item, grad in pairs]), loss.detach()
        self.missing = ()
        return torch.cat([grad.reshape(-1) for grad in grads]), loss.detach()

    def _by_hand(self, chain: LinearChain, params: Tensor, batch: Any, rng: int) -> tuple[Tensor, Tensor]:
        """The same for a chain of linear layers."""
        self.missing = ()
        draw = None
        if chain.draws and self.task.module.training:
            seed_global(rng)
            draw = _mask

        def loss(outputs: Tensor) -> tuple[Tensor, Tensor]:
            if self._output_loss is F.cross_entropy and batch[1].dtype == torch.int64 and batch[1].ndim == 1:
                return cross_entropy(outputs, batch[1])
            with torch.enable_grad():
                value = self._output_loss(outputs.requires_grad_(), batch[1])
            return torch.autograd.grad(value, outputs)[0], value.detach()

        return chain.gradient(params, batch[0], loss, draw)

    def full_gradient(self, params: Tensor, data: ClientData, order: Sequence[Tensor] = (), batches: int = 0) -> Tensor:
        """Mean gradient (P,) of the loss in eval mode, without augmentation.

        Args:
            params: (P,).
            data: of the client.
            order: its training batches in the round.
            batches: the mean is over the first so many of ``order``, at most one pass; 0: over all of ``data``.
        """
        indices = first_batches(order, batches, len(data)) if batches else _chunks(data)
        seen = sum(index.numel() for index in indices)
        self.task.module.eval()
        total = torch.zeros_like(params)
        try:
            for index in indices:
                batch = data.batch(index, None)
                grad, _ = self(params, batch, rng=0, update_buffers=False)
                total.add_(grad, alpha=self.task.size(batch) / seen)
        finally:  # the next client may be one whose data can be read
            self.task.module.train()
        return total

    def evaluate(self, params: Tensor, data: ClientData) -> dict[str, float]:
        """Metrics of ``params`` on ``data``, in eval mode; draws of the evaluation are always the same."""
        self._point(params)
        self.task.module.eval()
        seed_global(0)
        with torch.no_grad():
            found = self.task.evaluate(self._here(data.batch(index, None)) for index in _chunks(data))
        self.task.module.train()
        return found


def _mask(hidden: Tensor, p: float) -> Tensor:
    return torch.dropout(torch.ones_like(hidden), p, True)


def _flat(numel: int, grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(numel) if grad is None else grad.reshape(-1)


def _chunks(data: ClientData) -> tuple[Tensor, ...]:
    """Indices of all samples in stored order."""
    return torch.arange(len(data)).split(EVAL_BATCH)


def first_batches(order: Sequence[Tensor], batches: int, samples: int) -> list[Tensor]:
    """The first ``batches`` of the training batches in ``order``, no more than one pass over ``samples``."""
    passed = list(accumulate((index.numel() for index in order), initial=0))
    return [index for index, before in zip(order[:batches], passed, strict=False) if before < samples]
