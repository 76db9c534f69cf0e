"""The interface between a package's model and everything that trains it: the shared trainer, or fedcore."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any

import lightning as L
import torch
from torch import Tensor

from polymodal.seeding import seed_step

__all__ = ["NonFiniteError", "TaskModule"]


class NonFiniteError(RuntimeError):
    """The loss or a gradient became NaN or infinite."""


class TaskModule(L.LightningModule, ABC):
    """A LightningModule whose loss and evaluation are pure, so that others than Lightning can drive it.

    Subclasses fill in ``loss``, ``evaluate``, ``metrics`` and ``configure_optimizers``. No logging and no trainer in
    these: the shared callbacks read what the steps leave in ``train_logs`` and ``last_metrics``.

    Args:
        seed: root seed; the draws of a step are a function of (seed, epoch, batch index, rank).

    Attributes:
        train_logs: what the last step measured, by name; without a slash in it, ``train/`` is put in front.
        last_metrics: what the last validation or test measured, under full names; empty where it left a turn out.
        tested_step: last step whose validation measured ``test/`` metrics too, -1 before the first; None for a module
            that is tested at the end only.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.train_logs: dict[str, Tensor] = {}
        self.last_metrics: dict[str, float] = {}
        self.grad_norm: Tensor | None = None
        self.tested_step: int | None = None
        self._records: dict[str, Any] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; Lightning's note of the running hook, 50 times a step, is no parameter or module."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    @abstractmethod
    def loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of a batch.

        Args:
            batch: what the data module yields.
            generator: CPU generator for explicit draws; dropout uses the global one, seeded by the same names.

        Returns:
            The scalar loss with gradient, and its terms by name (detached scalars; logged as ``train/<name>``).
        """

    @abstractmethod
    def evaluate(self, batch: Any) -> dict[str, Any]:
        """Evaluate a batch: sample id -> picklable record (prediction, sums). Called in eval mode without gradient."""

    @abstractmethod
    def metrics(self, records: dict[str, Any]) -> dict[str, float]:
        """Metrics of a whole split from all records; names without the split, e.g. ``bleu4``."""

    def batch_size(self, batch: Any) -> int:
        """Samples in a batch, for throughput."""
        return len(batch.ids) if hasattr(batch, "ids") else len(batch[0])

    def describe_batch(self, batch: Any) -> str:
        """Name a batch in error messages: its sample ids where it has some."""
        ids = list(getattr(batch, "ids", []))
        return ", ".join(map(str, ids[:4])) + (", …" if len(ids) > 4 else "") if ids else "no sample ids"

    # ------------------------------------------------------------------ Lightning

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Seed the step, call ``loss``, keep its terms for the log callback."""
        generator = seed_step(self.seed, self.current_epoch, batch_idx, self.global_rank)
        loss, logs = self.loss(batch, generator)
        self.train_logs = {"loss": loss.detach(), **logs}
        return loss

    # Lightning asks for it at every step; stored, it is not worked out again.
    training_step.__signature__ = inspect.signature(training_step)  # type: ignore[attr-defined]

    def on_validation_epoch_start(self) -> None:
        """Start collecting."""
        self._records = {}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Collect the records of a batch."""
        self._records.update(self.evaluate(batch))

    def on_validation_epoch_end(self) -> None:
        """Gather by id over ranks, compute ``val/`` metrics."""
        self._finish_split("val")

    def on_test_epoch_start(self) -> None:
        """Start collecting."""
        self._records = {}

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Collect the records of a batch."""
        self._records.update(self.evaluate(batch))

    def on_test_epoch_end(self) -> None:
        """Gather by id over ranks, compute ``test/`` metrics."""
        self._finish_split("test")

    def _finish_split(self, split: str) -> None:
        # Keyed by sample id: the copies that a distributed sampler adds to even out the ranks fall together here.
        self.records = gather_records(self._records)
        self.last_metrics = {f"{split}/{k}": float(v) for k, v in self.metrics(self.records).items()}
        self._records = {}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm and keep it for the non-finite guard."""
        if not gradient_clip_val:
            self.grad_norm = None
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, float(gradient_clip_val), foreach=True)


def gather_records(records: dict[str, Any]) -> dict[str, Any]:
    """Union of all ranks' records, in the order of ranks; this rank's own without a process group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return records
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, records)
    merged: dict[str, Any] = {}
    for part in parts:
        merged.update(part)
    return merged
