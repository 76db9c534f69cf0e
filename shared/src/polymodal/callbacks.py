"""Callbacks of the shared trainer: checkpoints that survive a kill, metric rows, guard, progress without a terminal."""

from __future__ import annotations

import logging
import math
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import types
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from polymodal.cli import Interrupted
from polymodal.config import TrainerConfig
from polymodal.errors import UserError
from polymodal.files import atomic_write
from polymodal.run import Run, peak_mib
from polymodal.task import NonFiniteError

__all__ = [
    "AtomicCheckpointIO",
    "Checkpoints",
    "DataPosition",
    "MetricRows",
    "NonFiniteGuard",
    "PlainProgress",
    "RichProgress",
    "StopSignals",
    "link_file",
    "load_checkpoint",
]

SCHEMA_VERSION = 1
log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint files appear whole or not at all (temporary file, flush, rename).

    Args:
        marks: written into every file under ``polymodal`` with the schema version and the step, e.g. task and stage.
    """

    def __init__(self, marks: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.marks = marks or {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint``; UserError when the disk is full, with the older file left as it was."""
        step = checkpoint.get("global_step", 0)
        checkpoint["polymodal"] = {"schema_version": SCHEMA_VERSION, **self.marks, "step": step}
        atomic_write(Path(path), lambda handle: torch.save(checkpoint, handle))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it (``weights_only``).

    Raises:
        UserError: missing, damaged (every member's checksum is tested), or written by a newer version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"checkpoint {path} is damaged (member {damaged}); use another checkpoint")
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}") from error
    except (zipfile.BadZipFile, EOFError, RuntimeError, OSError) as error:
        raise UserError(f"checkpoint {path} is damaged ({' '.join(str(error).split())[:100]})") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} holds more than tensors and plain values, which could run code; give a checkpoint "
            "that this project wrote"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"checkpoint {path} has no state_dict; give a checkpoint that this project wrote")
    version = checkpoint.get("polymodal", {}).get("schema_version", 0)
    if version > SCHEMA_VERSION:
        raise UserError(f"checkpoint {path}: schema version {version} is newer than this polymodal reads")
    return checkpoint


class Checkpoints(L.Callback):
    """``last.ckpt`` (full state), ``previous.ckpt`` (the one before) and ``best.ckpt`` (weights); early stopping.

    ``last`` is written at epoch ends after validation, and within an epoch every so many minutes or steps, always
    right after an optimizer step: accumulated gradients are not in the file. Within an epoch the last batch is left
    out: Lightning, resumed there, would skip the epoch's validation. When a later stage finds its first ``best``, the
    earlier stage's becomes ``stage<n>.ckpt``.

    Args:
        run: the run; files go to ``run.folder / "checkpoints"``.
        config: cadence, and patience: validations without improvement after which training stops.
        monitor: full metric name that picks ``best``; None keeps no best.
        mode: ``max`` or ``min``.
        stage: number of the training stage, stored in the file.
    """

    def __init__(
        self, run: Run, config: TrainerConfig, monitor: str | None = None, mode: str = "max", stage: int = 0
    ) -> None:
        self.run, self.config, self.monitor, self.mode, self.stage = run, config, monitor, mode, stage
        self.folder = run.folder / "checkpoints"
        self.best: float | None = None
        self.best_epoch = -1
        self.stale = 0
        self._saved_at = time.monotonic()
        self._step = 0
        self.stop = StopSignals()

    def state_dict(self) -> dict[str, Any]:
        """Best value so far and validations since, so that a resumed run keeps comparing with it."""
        return {"best": self.best, "best_epoch": self.best_epoch, "stale": self.stale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best value and the count."""
        self.best, self.best_epoch = state_dict["best"], state_dict["best_epoch"]
        self.stale = state_dict.get("stale", 0)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Take over Ctrl-C and SIGTERM; a run that had stopped early is complete."""
        self.stop.install()
        trainer.should_stop = trainer.should_stop or self._out_of_patience

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Remember where training starts."""
        self._step = trainer.global_step

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Give the signals back."""
        self.stop.remove()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save by time or steps, and when the user asked to stop."""
        if trainer.global_step == self._step:  # in the middle of an accumulation
            return
        self._step = trainer.global_step
        last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        config = self.config
        due = bool(config.checkpoint_every_steps) and trainer.global_step % config.checkpoint_every_steps == 0
        due = due or self._overdue
        if trainer.world_size > 1:  # clocks and signals differ between processes; rank 0 decides for all
            due, self.stop.requested = trainer.strategy.broadcast((due, self.stop.requested))
        if (due or self.stop.requested) and not last_batch:
            self.save_last(trainer)
        if self.stop.requested and not last_batch:
            raise Interrupted(self._farewell(f"saved at step {trainer.global_step}"))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop in the middle of a validation: the last checkpoint stands. After its last batch, the epoch is saved."""
        if self.stop.requested and batch_idx + 1 < trainer.num_val_batches[dataloader_idx]:
            raise Interrupted(self._farewell("stopped during validation; the last checkpoint stands"))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep the weights of the best validation; count those that were not, and stop when patience is at its end."""
        if self.monitor is None or trainer.state.fn != "fit" or not pl_module.last_metrics:
            return
        if self.monitor not in pl_module.last_metrics:
            known = ", ".join(pl_module.last_metrics)
            raise UserError(f"monitor {self.monitor!r} is not a validation metric; there are: {known}")
        value = pl_module.last_metrics[self.monitor]
        better = self.best is None or (value > self.best if self.mode == "max" else value < self.best)
        better = better and not math.isnan(value)
        self.stale = 0 if better else self.stale + 1
        if better:
            if self.best is None and trainer.is_global_zero:
                self._keep_earlier_stage()
            self.best, self.best_epoch = value, trainer.current_epoch
            trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=True)
        elif self._out_of_patience:
            trainer.should_stop = True
            best = "no number yet" if self.best is None else f"best {self.best:.4g} in epoch {self.best_epoch + 1}"
            log.info("%s has not improved in %d validations (%s); stopping", self.monitor, self.stale, best)

    @property
    def _out_of_patience(self) -> bool:
        return bool(self.config.patience) and self.stale >= self.config.patience

    @property
    def _overdue(self) -> bool:
        minutes = self.config.checkpoint_every_minutes
        return bool(minutes) and time.monotonic() - self._saved_at > 60 * minutes

    def _keep_earlier_stage(self) -> None:
        path = self.folder / "best.ckpt"
        if path.is_file():
            stage = load_checkpoint(path).get("polymodal", {}).get("stage", self.stage)
            if stage != self.stage:
                link_file(path, self.folder / f"stage{stage}.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save at the end of an epoch, after its validation."""
        every = self.config.checkpoint_every_epochs
        final = trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop
        due = bool(every) and (trainer.current_epoch + 1) % every == 0
        if trainer.world_size == 1:  # clocks differ between processes
            due = due or self._overdue
        if final or self.stop.requested or due:
            self.save_last(trainer)
        if self.stop.requested and not final:
            unit = "round" if self.run.step_name == "round" else "epoch"
            raise Interrupted(self._farewell(f"saved after {unit} {trainer.current_epoch + 1}"))

    def save_last(self, trainer: L.Trainer) -> None:
        """Write ``last.ckpt``; the one before becomes ``previous.ckpt`` without a moment in which neither exists."""
        last, previous = self.folder / "last.ckpt", self.folder / "previous.ckpt"
        if trainer.is_global_zero and last.exists():
            link_file(last, previous)
        trainer.save_checkpoint(last)
        self._saved_at = time.monotonic()

    def _farewell(self, what: str) -> str:
        return f"{what}; continue with --resume {self.run.folder}"


def link_file(source: Path, target: Path) -> None:
    """``target`` becomes ``source``, which stays, without a moment in which it is neither the old nor the new one."""
    spare = target.with_name(f".{target.name}.tmp")
    spare.unlink(missing_ok=True)
    try:
        os.link(source, spare)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, spare)
    spare.replace(target)


class StopSignals:
    """The first Ctrl-C or SIGTERM asks the training loop to save and stop; the second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Set the handlers (main thread only)."""
        if threading.current_thread() is not threading.main_thread() or self._before:
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)

    def remove(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        sys.stderr.write("\nstopping after this batch (again to stop at once)\n")


class DataPosition(L.Callback):
    """Keeps the place in the epoch, so that a run resumed in mid-epoch goes on with the very next batch.

    The data module makes its training batch sampler in ``setup`` and offers it as ``train_sampler``, with
    ``set_epoch(epoch)`` and ``start_batch``; its order is a function of (seed, epoch). The place is set before the
    loader starts its workers. How far workers had read ahead does not matter: what counts is what was trained on.
    """

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Store (epoch, batches done)."""
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        checkpoint["polymodal_position"] = {"epoch": trainer.current_epoch, "batch": progress.processed}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Point the sampler at the next batch."""
        sampler = self._sampler(trainer)
        position = checkpoint.get("polymodal_position")
        if sampler is None or position is None or trainer.state.fn != "fit":
            return
        done = position["batch"] >= len(sampler)
        sampler.set_epoch(position["epoch"] + 1 if done else position["epoch"])
        sampler.start_batch = 0 if done else position["batch"]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Tell the sampler the epoch (Lightning starts the loader of a later epoch after this hook)."""
        sampler = self._sampler(trainer)
        if sampler is not None:
            sampler.set_epoch(trainer.current_epoch)

    @staticmethod
    def _sampler(trainer: L.Trainer) -> Any | None:
        return getattr(getattr(trainer, "datamodule", None), "train_sampler", None)


class MetricRows(L.Callback):
    """Writes ``train/``, ``perf/``, ``val/`` and ``test/`` rows to the run's loggers, past Lightning's own logging.

    ``self.log`` costs about a tenth of a millisecond a call; here a step costs two clock reads, and values leave the
    device only every ``log_every_steps`` steps.

    Args:
        run: receives the rows.
        every: optimizer steps between rows.
        step_offset: steps of earlier stages, so that the x-axis goes on.
    """

    def __init__(self, run: Run, every: int, step_offset: int = 0) -> None:
        self.run, self.every, self.offset = run, max(1, every), step_offset
        self._reset(time.perf_counter())
        self._logged = 0

    def _reset(self, now: float) -> None:
        self._begin, self._ended = now, now
        self._waited, self._steps, self._samples = 0.0, 0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """The step that training starts from has its row, or is none."""
        self._logged = trainer.global_step

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Leave validation time out of the throughput."""
        self._reset(time.perf_counter())

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count the time since the last step as waiting for data."""
        self._waited += time.perf_counter() - self._ended

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write a row every ``every`` optimizer steps."""
        self._steps += 1
        self._samples += pl_module.batch_size(batch)
        step = trainer.global_step
        if step % self.every == 0 and step != self._logged:
            self._logged = step
            logs = pl_module.train_logs
            values = {k if "/" in k else f"train/{k}": _scalar(v) for k, v in logs.items()}
            if trainer.optimizers:
                values["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            now = time.perf_counter()
            spent = max(now - self._begin, 1e-9)
            values |= {
                "perf/step_ms": 1000 * spent / self._steps,
                "perf/samples_per_s": self._samples / spent,
                "perf/data_wait": self._waited / spent,
                "perf/peak_mib": peak_mib(),
            }
            if trainer.is_global_zero:
                self.run.log(values, step + self.offset, trainer.current_epoch)
            self._reset(time.perf_counter())
        self._ended = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the ``val/`` row."""
        if trainer.state.fn == "fit" and trainer.is_global_zero and pl_module.last_metrics:
            self.run.log(pl_module.last_metrics, trainer.global_step + self.offset, trainer.current_epoch)

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the ``test/`` row, without what the last validation has written at this step."""
        metrics = dict(pl_module.last_metrics)
        if pl_module.tested_step == trainer.global_step:
            metrics = {name: value for name, value in metrics.items() if not name.startswith("test/")}
        if trainer.is_global_zero and metrics:
            self.run.log(metrics, self.offset, None)


def _scalar(value: Any) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


class NonFiniteGuard(L.Callback):
    """Stops at a NaN or infinite loss or gradient and names step, samples and parameter.

    On the CPU every step is checked; on a device every ``every`` steps, to keep the queue full.
    """

    def __init__(self, every: int) -> None:
        self.every = max(1, every)

    def _due(self, trainer: L.Trainer, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" or trainer.global_step % self.every == 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remember the batch for the message."""
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Check the loss."""
        if self._due(trainer, loss) and not bool(torch.isfinite(loss)):
            self._fail(trainer, pl_module, f"loss is {float(loss.detach())}", weights=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check the gradient norm that clipping computed (fp16 loss scaling has infinite ones by design)."""
        norm = pl_module.grad_norm
        if norm is None or trainer.precision == "16-mixed" or not self._due(trainer, norm):
            return
        if not bool(torch.isfinite(norm)):
            self._fail(trainer, pl_module, "gradient is not finite", weights=False)

    def _fail(self, trainer: L.Trainer, module: Any, what: str, *, weights: bool) -> None:
        bad = [
            name
            for name, parameter in module.named_parameters()
            for tensor in [parameter.data if weights else parameter.grad]
            if tensor is not None and not bool(torch.isfinite(tensor).all())
        ]
        where = f"first bad parameter: {bad[0]}" if bad else "all parameters are finite"
        raise NonFiniteError(
            f"{what} at step {trainer.global_step}, batch of {module.describe_batch(self._batch)}; {where}; "
            "lower the learning rate or use --trainer.precision 32-true"
        )


class PlainProgress(L.Callback):
    """One line an epoch where there is no terminal: loss, validation, rate, time left.

    Args:
        unit: what an epoch is called.
    """

    def __init__(self, unit: str = "epoch") -> None:
        self.unit = unit

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._start, self._first, self._step = time.monotonic(), trainer.current_epoch, trainer.global_step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the line."""
        if not trainer.is_global_zero:
            return
        done = trainer.current_epoch + 1
        spent = time.monotonic() - self._start
        total = -(-int(trainer.estimated_stepping_batches) * done // max(1, trainer.global_step))
        left = spent / max(1, done - self._first) * max(0, total - done)
        parts = [f"{self.unit} {done}/{total}"]
        if "loss" in pl_module.train_logs:
            parts.append(f"loss {_scalar(pl_module.train_logs['loss']):.3f}")
        if done % (trainer.check_val_every_n_epoch or 1) == 0:
            parts += [f"{k} {v:.3f}" for k, v in list(pl_module.last_metrics.items())[:3]]
        rate = (trainer.global_step - self._step) / max(spent, 1e-9)
        parts.append(f"{rate:.1f} steps/s · {spent:.0f} s, {left:.0f} s left")
        sys.stderr.write(" · ".join(parts) + "\n")
        sys.stderr.flush()


class RichProgress(RichProgressBar):
    """Lightning's rich bar with the loss of the shared log."""

    def get_metrics(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        """Loss and the first validation metric."""
        shown: dict[str, Any] = {}
        if "loss" in pl_module.train_logs:
            shown["loss"] = f"{_scalar(pl_module.train_logs['loss']):.3f}"
        for name, value in list(pl_module.last_metrics.items())[:1]:
            shown[name] = f"{value:.2f}"
        return shown
