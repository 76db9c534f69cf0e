"""Whether clients can be computed together: the stacked gradient has to show the model's own result first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedcore.engines.stacked_data import CannotStackError, StackedData
from fedcore.engines.stacked_gradients import StackedBatch, StackedGradient, stacked_gradient

if TYPE_CHECKING:
    from fedcore.engines.base import Federation
    from fedcore.learner import Learner

__all__ = ["checked_gradient"]

PROBE = 64
"""samples of the batch on which both are compared"""
ERRORS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AttributeError)
"""what a model raises that gets something it does not know"""


def checked_gradient(federation: Federation) -> StackedGradient:
    """The stacked gradient of a federation's model.

    Raises:
        CannotStackError: why its clients cannot be computed together.
    """
    if len(federation.learners) > 1:
        raise CannotStackError("models of the clients differ in rank")
    (learner,) = federation.learners.values()
    if any(algorithm.shifts_base for algorithm in federation.algorithms.values()):
        raise CannotStackError("frozen weights change between rounds")
    task = learner.task
    if task.sample_losses() is None:
        raise CannotStackError(f"{type(task.module).__name__} and its loss give no loss of single samples")
    for data in federation.data:
        if data.tensors is not None and len(data.tensors) == 2 and _left_out(data.tensors[1]):
            raise CannotStackError("targets below zero, which losses leave out of their mean")
    batch = _probe(federation, learner)
    gradient = stacked_gradient(task, learner.spec)
    _compare(learner, gradient, batch)
    return gradient


def _left_out(targets: Tensor) -> bool:
    return not targets.is_floating_point() and targets.numel() > 0 and bool(targets.min() < 0)


def _probe(federation: Federation, learner: Learner) -> StackedBatch:
    """A batch of the first client whose data can be read."""
    for data in federation.data:
        if not len(data):
            continue
        stack = StackedData([data], learner.device, torch.promote_types(learner.spec.dtype, torch.float32))
        batch = stack.gather(stack.rows(0, [torch.arange(min(PROBE, len(data)))]))
        if not stack.errors:
            return batch
    raise CannotStackError("no client has data that can be read")


def _compare(learner: Learner, gradient: StackedGradient, batch: StackedBatch) -> None:
    """Raise CannotStackError unless both give the same gradient; the model's buffers stay as they are."""
    before, start = learner.buffers, learner.start.clone()
    try:
        expected, loss = learner(start, (batch.inputs[0], batch.targets[0]), rng=0)
    except ERRORS as error:
        raise CannotStackError(f"the model fails on a first batch: {_line(error)}") from error
    if not learner.loss_is_pure((batch.inputs[0], batch.targets[0])):
        raise CannotStackError("the loss reads more than outputs and targets")
    gradient.missing = learner.missing
    changed = [name for name, value in learner.buffers.items() if not torch.equal(value, before[name])]
    learner.load_buffers(before)
    if changed:
        raise CannotStackError(f"the buffer {changed[0]} changes in training")
    try:
        found, losses = gradient(start.unsqueeze(0), batch, (0,))
    except ERRORS as error:
        raise CannotStackError(f"torch.func cannot transform the model: {_line(error)}") from error
    bound = {torch.float64: 1e-9, torch.float32: 1e-2}.get(expected.dtype, 0.1)
    same = bool((found[0] - expected).norm() <= bound * expected.norm())
    if not same or not torch.allclose(losses[0].to(loss.dtype), loss, rtol=bound):
        raise CannotStackError("the loss of a batch is not the mean over its samples")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
