"""One continual step on the shared training layer: loss of a method, evaluation, optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from polymodal.task import TaskModule
from torch import Tensor, nn

from css.data.batch import Batch
from css.methods.base import Method, StepContext
from css.metrics import add_sparse, segmentation_report, sparse_confusion
from css.settings import OptimConfig

__all__ = ["CSSModule"]


class CSSModule(TaskModule):
    """A method at one continual step.

    Args:
        ctx: networks and sizes of the step; only ``ctx.net`` is trained and stored.
        method: loss, start of heads, prediction rule.
        optim: optimizer and schedule.
        base: classes of the base step (channels 1..base), for the report.
        seed: root seed.
        total_steps: length of the schedule where something other than Lightning's trainer drives the module.
        meta: plain data stored in checkpoints under ``css``.
        after_test: further test metrics of this module, such as those that need the steps before; called when
            ``confusion`` and ``records`` are complete.

    Attributes:
        confusion: (channels, channels) counts of the last evaluated split, rows are the truth.
        fitted_steps: optimizer steps of the fit.
        val_metrics: the last validation's, where there is a validation split.
    """

    def __init__(
        self,
        ctx: StepContext,
        method: Method,
        optim: OptimConfig,
        *,
        base: int,
        seed: int = 0,
        total_steps: int | None = None,
        meta: dict[str, Any] | None = None,
        after_test: Callable[[CSSModule], dict[str, float]] | None = None,
    ) -> None:
        super().__init__(seed)
        self.net = ctx.net
        self.ctx, self.method, self.optim, self.base = ctx, method, optim, base
        self.total_steps, self.meta, self.after_test = total_steps, meta or {}, after_test
        self.confusion: np.ndarray | None = None
        self.fitted_steps = 0
        self.val_metrics: dict[str, float] = {}

    # ------------------------------------------------------------------ what the shared layer asks for

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the method."""
        return self.method.loss(self.ctx, batch, generator)

    def evaluate(self, batch: Batch) -> dict[str, Any]:
        """Picture id -> its confusion counts, sparse."""
        predictions = self.method.predict(self.net.full_logits(batch.images))
        channels = self.net.num_channels
        pairs = zip(batch.ids, batch.labels, predictions, strict=True)
        return {name: sparse_confusion(label, guess, channels) for name, label, guess in pairs}

    def metrics(self, records: dict[str, Any]) -> dict[str, float]:
        """IoU means in percent: ``miou_all``, ``miou_old``, and in later steps ``miou_new`` and ``miou_harmonic``."""
        channels = self.net.num_channels
        self.confusion = np.zeros((channels, channels), np.int64)
        for record in records.values():
            add_sparse(self.confusion, record)
        report = segmentation_report(self.confusion, min(self.base, channels - 1), max(channels - 1 - self.base, 0))
        names = ["old", "all"] + (["new", "harmonic"] if channels - 1 > self.base else [])
        return {f"miou_{name}": report[name] for name in names}

    # ------------------------------------------------------------------ Lightning

    def on_fit_start(self) -> None:
        """Bring the frozen parts, which are no submodules, to the device; let the method look at the pictures."""
        if self.ctx.old is not None:
            self.ctx.old.to(self.device)
        if self.ctx.bank is not None:
            self.ctx.bank.to(self.device)
        if self.ctx.step:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning's data connector
            self.method.prepare(self.ctx, (batch.to(self.device) for batch in data.plain_batches()))

    def on_fit_end(self) -> None:
        """Remember the length of the fit; unlike ``on_train_end``, it is called where a resumed fit was complete."""
        self.fitted_steps = self.trainer.global_step

    def on_validation_epoch_end(self) -> None:
        """Validation metrics; kept, because rates are picked by the last ones."""
        super().on_validation_epoch_end()
        self.val_metrics = dict(self.last_metrics)

    def on_test_epoch_end(self) -> None:
        """Test metrics, with the step as their x-axis."""
        super().on_test_epoch_end()
        if self.after_test is not None:
            self.last_metrics |= {f"test/{name}": value for name, value in self.after_test(self).items()}
        self.last_metrics["task"] = float(self.ctx.step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the weights belong to."""
        checkpoint["css"] = self.meta
        checkpoint["css_val"] = self.val_metrics

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A run that goes on after its last validation still knows what came out."""
        self.val_metrics = dict(checkpoint.get("css_val", {}))

    def configure_optimizers(self) -> Any:
        """SGD in four groups (backbone, neck, old heads, new head) with a schedule per optimizer step."""
        groups = self.parameter_groups()
        optim = self.optim
        optimizer = torch.optim.SGD(groups, lr=groups[0]["lr"], momentum=optim.momentum, nesterov=optim.nesterov)
        total = self.total_steps or int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int, total: int) -> float:
        """Share of the peak rate at an optimizer step."""
        optim = self.optim
        if optim.schedule == "constant":
            return 1.0
        warm = int(optim.warmup * total) if optim.schedule == "warm_poly" else 0
        if step < warm:
            return (step + 1) / warm
        return math.pow(max(0.0, 1 - (step - warm) / max(1, total - warm)), optim.power)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of the optimizer: rates 1 : f : f : f, decay on everything in step 0 and as configured later.

        Frozen parameters are left out: those without gradient, and those to which the method gives the factor 0.
        """
        optim, later = self.optim, self.ctx.step > 0
        lr = optim.later_lr if later else optim.lr
        factors = self.method.trainable(self.ctx) if later else {}
        for parameter, factor in factors.items():
            parameter.requires_grad_(factor > 0)
        decay_all = not later or optim.decay_later == "all"
        groups: list[dict[str, Any]] = []
        for name, parameters in self.net.parameter_groups().items():
            rate = lr if name == "backbone" else lr * optim.head_factor
            decay = optim.weight_decay if decay_all or name == "new_head" else 0.0
            by_factor: dict[float, list[nn.Parameter]] = {}
            for parameter in parameters:
                if parameter.requires_grad:
                    by_factor.setdefault(factors.get(parameter, 1.0), []).append(parameter)
            for factor, members in by_factor.items():
                groups.append({"params": members, "lr": rate * factor, "weight_decay": decay, "name": name})
        return groups
