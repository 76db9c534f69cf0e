"""What is trained: a model with a loss, a ``polymodal.TaskModule``, or a plain LightningModule, behind one face."""

from __future__ import annotations

import inspect
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError
from polymodal.seeding import generator
from torch import Tensor, nn

if TYPE_CHECKING:
    from polymodal.task import TaskModule

__all__ = ["PlainTask", "SharedTask", "StepTask", "Task", "as_task"]

log = logging.getLogger(__name__)


class Task(ABC):
    """A module and how its loss and its metrics are computed.

    Args:
        module: the module that is trained; its parameters are moved into one flat vector.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    @abstractmethod
    def loss(self, batch: Any, rng: int) -> Tensor:
        """Mean training loss of a batch, with gradient."""

    def size(self, batch: Any) -> int:
        """Samples of a batch."""
        return len(batch[1])

    @abstractmethod
    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Metrics over a whole data set; called in eval mode without gradient."""

    def output_loss(self) -> Callable[[Tensor, Any], Tensor] | None:
        """``(outputs, targets) -> mean loss``, where the loss of a batch ``(inputs, targets)`` is that and no more."""
        return None

    def sample_losses(self) -> Callable[[Tensor, Any], Tensor] | None:
        """``(outputs, targets) -> loss of each sample``, where the mean loss is a mean over samples."""
        return None


class PlainTask(Task):
    """Any model with a loss on ``(inputs, targets)`` batches.

    Args:
        module: ``module(inputs)`` gives what the loss takes.
        loss: ``loss(outputs, targets) -> mean``; a function with a ``reduction`` argument can also be batched over
            clients of unequal sizes.
    """

    def __init__(self, module: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__(module)
        self._loss = loss

    def loss(self, batch: Any, rng: int) -> Tensor:
        """Mean loss of a batch."""
        return self._loss(self.module(batch[0]), batch[1])

    def output_loss(self) -> Callable[[Tensor, Any], Tensor] | None:
        """The loss itself."""
        return self._loss if type(self).loss is PlainTask.loss else None

    def sample_losses(self) -> Callable[[Tensor, Any], Tensor] | None:
        """The loss with ``reduction="none"``, where it has that."""
        if self.output_loss() is None:
            return None
        try:
            known = "reduction" in inspect.signature(self._loss).parameters
        except (TypeError, ValueError):  # a callable without a readable signature
            known = False
        return (lambda outputs, targets: self._loss(outputs, targets, reduction="none")) if known else None

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Mean loss, and the share of right classes where targets are class numbers."""
        total = torch.zeros((), dtype=torch.float64)
        right, count, classes = 0, 0, False
        for inputs, targets in batches:
            outputs = self.module(inputs)
            total += self._loss(outputs, targets).double().cpu() * len(targets)
            count += len(targets)
            if not targets.is_floating_point() and outputs.ndim == 2:
                classes = True
                right += int((outputs.argmax(dim=1) == targets).sum())
        if not count:
            raise UserError("the data set to evaluate on is empty")
        found = {"loss": float(total) / count}
        return {"accuracy": right / count, **found} if classes else found


class SharedTask(Task):
    """A ``polymodal.TaskModule``: its own pure loss, its own metrics."""

    module: TaskModule

    def loss(self, batch: Any, rng: int) -> Tensor:
        """The module's loss, with a generator seeded by the step."""
        return self.module.loss(batch, generator(rng, "loss"))[0]

    def size(self, batch: Any) -> int:
        """As the module counts."""
        return self.module.batch_size(batch)

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """The module's metrics over all records."""
        records: dict[str, Any] = {}
        for batch in batches:
            records |= self.module.evaluate(batch)
        return {name: float(value) for name, value in self.module.metrics(records).items()}


class StepTask(Task):
    """A plain LightningModule: ``training_step`` gives the loss; its optimizers and logging are ignored."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        module.log = module.log_dict = _ignore
        log.warning("%s: its own optimizers and logging are ignored; clients run serial", type(module).__name__)

    def loss(self, batch: Any, rng: int) -> Tensor:
        """What ``training_step`` returns, or its entry ``loss``."""
        result = self.module.training_step(batch, 0)
        return result["loss"] if isinstance(result, dict) else result

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Mean of ``training_step``'s loss in eval mode: a plain module says nothing else without a trainer."""
        total, count = 0.0, 0
        for batch in batches:
            size = self.size(batch)
            total += float(self.loss(batch, 0)) * size
            count += size
        return {"loss": total / max(count, 1)}


def _ignore(*arguments: Any, **options: Any) -> None:
    """Stands in for ``self.log``."""


def as_task(model: Any, loss: Callable[[Tensor, Any], Tensor]) -> Task:
    """The task that ``model`` means; ``loss`` is used for plain models only.

    Raises:
        UserError: not a module.
    """
    if isinstance(model, Task):
        return model
    # Importing lightning takes seconds; where nobody has, the model is none of its modules.
    if "lightning" in sys.modules:
        import lightning
        from polymodal.task import TaskModule

        if isinstance(model, TaskModule):
            return SharedTask(model)
        if isinstance(model, lightning.LightningModule):
            return StepTask(model)
    if isinstance(model, nn.Module):
        return PlainTask(model, loss)
    raise UserError(f"model of type {type(model).__name__}; expected a torch module")
