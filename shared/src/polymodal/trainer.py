"""The one trainer of all packages: built from TrainerConfig and a Run, resumable, tested with the best weights."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import lightning as L
import torch
from lightning.pytorch.profilers import PassThroughProfiler

from polymodal.callbacks import (
    AtomicCheckpointIO,
    Checkpoints,
    DataPosition,
    MetricRows,
    NonFiniteGuard,
    PlainProgress,
    RichProgress,
    link_file,
    load_checkpoint,
)
from polymodal.config import TrainerConfig
from polymodal.errors import UserError
from polymodal.logs import CsvLog
from polymodal.run import Run
from polymodal.task import TaskModule

__all__ = [
    "StageOptions",
    "build_trainer",
    "evaluate",
    "evaluate_fitted",
    "fit",
    "fit_and_test",
    "load_best",
    "quiet_lightning",
    "resume_checkpoint",
    "stage_of_checkpoint",
    "trainer_arguments",
]

log = logging.getLogger(__name__)
_NOTHING = contextlib.nullcontext()


class _NoProfiler(PassThroughProfiler):
    """Lightning's empty profiler without the generator that it makes and runs for each of 50 hooks a step."""

    def profile(self, action_name: str) -> Any:
        """A context that does nothing, always the same."""
        return _NOTHING


class StageOptions(TypedDict, total=False):
    """What distinguishes one fit of a run from another; all optional."""

    monitor: str | None
    """full name of the metric that picks the best weights, e.g. ``"val/bleu4"``; none keeps no best"""
    mode: str
    """``max`` (default) or ``min``"""
    stage: int
    """number of the training stage, stored in checkpoints (default 0)"""
    step_offset: int
    """optimizer steps of earlier stages, added to the logged step (default 0)"""


def trainer_arguments(config: TrainerConfig) -> dict[str, Any]:
    """Arguments of ``lightning.Trainer`` that a configuration means, without loggers, callbacks and folders.

    For a fit beside the run's own, such as a probe that must be trained with equal settings.

    Raises:
        UserError: an accelerator that is not there.
    """
    if config.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError("--trainer.accelerator gpu: torch finds no GPU here; use cpu or auto")
    return {
        "accelerator": config.accelerator,
        "devices": config.devices,
        # Stages leave parts of a model unused, e.g. the fusion in stage 1.
        "strategy": "auto" if config.devices == 1 else "ddp_find_unused_parameters_true",
        "precision": config.precision,
        "max_epochs": config.max_epochs,
        "max_steps": config.max_steps,
        "gradient_clip_val": config.clip_grad or None,
        "accumulate_grad_batches": config.accumulate,
        "check_val_every_n_epoch": config.val_every_epochs,
        "log_every_n_steps": config.log_every_steps,
        "deterministic": config.deterministic,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "profiler": _NoProfiler(),
        **config.extra,
    }


def build_trainer(
    config: TrainerConfig, run: Run, callbacks: Sequence[L.Callback] = (), **options: Unpack[StageOptions]
) -> L.Trainer:
    """A ``lightning.Trainer`` with the shared callbacks and the run's loggers.

    Args:
        config: how to train.
        run: where to write.
        callbacks: the package's own callbacks, called before the shared ones.
        options: see ``StageOptions``.

    Raises:
        UserError: an accelerator that is not there, or an argument in ``config.extra`` that Lightning does not know.
    """
    _quiet_loggers()
    every, stage = config.log_every_steps, options.get("stage", 0)
    if config.patience and options.get("monitor") is None:
        raise UserError(
            f"trainer.patience={config.patience}: nothing is monitored here that could improve; use 0 (off)"
        )
    progress = _progress(config, run.step_name)
    shared: list[L.Callback] = [
        DataPosition(),
        NonFiniteGuard(every),
        MetricRows(run, every, options.get("step_offset", 0)),
        Checkpoints(run, config, options.get("monitor"), options.get("mode", "max"), stage),
        *progress,
    ]
    arguments = {
        "logger": run.loggers,
        "callbacks": [*callbacks, *shared],
        "plugins": [AtomicCheckpointIO({"task": run.manifest["task"], "stage": stage})],
        "default_root_dir": run.folder,
        "enable_progress_bar": any(isinstance(c, RichProgress) for c in progress),
    }
    try:
        trainer = L.Trainer(**{**arguments, **trainer_arguments(config)})
    except TypeError as error:
        raise UserError(f"trainer.extra: {error}") from error
    _cheap_device_check()
    run.note(device=_device(trainer), precision=config.precision)
    return trainer


def _cheap_device_check() -> None:
    """Without a GPU, let torch ask the CUDA runtime whether there is one, as it does by default.

    Lightning makes it load NVIDIA's management library instead, so that processes can be forked safely on a machine
    with a GPU. Where the library is missing, the search is repeated at every step of Adam (0.1 ms).
    """
    if not torch.cuda.is_available():
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"


def _progress(config: TrainerConfig, step_name: str) -> list[L.Callback]:
    kind = config.progress
    if kind == "auto":
        kind = "rich" if sys.stdout.isatty() else "plain"
    if kind == "rich":
        return [RichProgress(leave=False)]
    return [PlainProgress("round" if step_name == "round" else "epoch")] if kind == "plain" else []


def _device(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)


def _quiet_loggers() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave out Lightning's advice that does not apply: small data is read faster by one process, resuming is ours."""
    _quiet_loggers()
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*dataloader is not resumable.*",
            ".*in eval mode at the start of training.*",
            ".*isinstance.treespec, LeafSpec.*",
            ".*smaller than the logging interval.*",
            ".*but have no logger configured.*",
            ".*across ranks is zero.*",  # an empty list of validation loaders, where there is no such split
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C stays Ctrl-C: Lightning would end the process with the code of a failure."""
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None
        raise


def resume_checkpoint(run: Run, stage: int = 0) -> Path | None:
    """The checkpoint from which ``stage`` goes on, or None to start it fresh. Errors as ``stage_of_checkpoint``."""
    return run.checkpoint if stage_of_checkpoint(run) == stage else None


def stage_of_checkpoint(run: Run) -> int | None:
    """Stage of the checkpoint that the run continues from, None for a new run.

    The checkpoint is read and tested once a run. A damaged ``last.ckpt`` falls back to ``previous.ckpt`` with a
    warning; ``run.checkpoint`` is then that one.

    Raises:
        UserError: a checkpoint that the user named is damaged or of another task, or no readable one is left.
    """
    marks = _checkpoint_marks(run)
    return None if marks is None else int(marks.get("stage", 0))


def _checkpoint_marks(run: Run) -> dict[str, Any] | None:
    """Task, stage and step of the checkpoint to continue from; kept on the run, as reading it may take seconds."""
    if run.checkpoint is None:
        return None
    if run.checkpoint_marks is not None:
        return run.checkpoint_marks
    candidates = [run.checkpoint]
    if run.checkpoint.name == "last.ckpt":
        candidates.append(run.checkpoint.with_name("previous.ckpt"))
    problem: UserError | None = None
    for path in candidates:
        try:
            marks: dict[str, Any] = load_checkpoint(path).get("polymodal", {})
        except UserError as error:
            problem = problem or error
            continue
        if marks.get("task") != run.manifest["task"]:
            raise UserError(f"checkpoint {path} is of task {marks.get('task')!r}, not {run.manifest['task']!r}")
        if problem is not None:
            log.warning("%s; going on from %s (step %s)", problem, path.name, marks.get("step"))
            if run.is_writer:  # the next save makes last.ckpt the previous one: not a damaged file
                link_file(path, run.checkpoint)
        run.checkpoint, run.checkpoint_marks = path, marks
        return marks
    raise problem or UserError(f"no checkpoint in {run.folder}")


def fit(
    module: TaskModule,
    data: L.LightningDataModule,
    config: TrainerConfig,
    run: Run,
    callbacks: Sequence[L.Callback] = (),
    **options: Unpack[StageOptions],
) -> L.Trainer:
    """Train one stage, from the run's checkpoint where it has one of this stage. Arguments as ``build_trainer``."""
    trainer = build_trainer(config, run, callbacks, **options)
    checkpoint = resume_checkpoint(run, options.get("stage", 0))
    if run.manifest["resumed"]:
        reached = (run.checkpoint_marks or {}).get("step", 0) if checkpoint else 0
        for logger in run.loggers:
            if isinstance(logger, CsvLog):
                offset = options.get("step_offset", 0)
                logger.rewind(reached + offset, offset, keep_tests=module.tested_step is not None)
    try:
        with quiet_lightning(), _interruptible():
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    finally:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's callback connector
            if isinstance(callback, Checkpoints):
                callback.stop.remove()  # after an error, Lightning calls no teardown of callbacks
    run.checkpoint = run.checkpoint_marks = None  # a later stage starts from this one's weights, not from a file
    return trainer


def evaluate(module: TaskModule, data: L.LightningDataModule, trainer: L.Trainer) -> dict[str, float]:
    """``test/`` metrics of the module as it is."""
    with quiet_lightning(), _interruptible():
        trainer.test(module, datamodule=data, verbose=False)
    return dict(module.last_metrics)


def evaluate_fitted(module: TaskModule, data: L.LightningDataModule, trainer: L.Trainer) -> dict[str, float]:
    """``evaluate`` right after ``fit``, with rows that stand at the last step of the fit."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's callback connector
        if isinstance(callback, MetricRows):
            callback.offset += trainer.global_step
    return evaluate(module, data, trainer)


def load_best(module: TaskModule, run: Run, stage: int = 0) -> None:
    """Load the best weights of ``stage`` into the module, where the run kept some."""
    folder = run.folder / "checkpoints"
    for path in (folder / "best.ckpt", folder / f"stage{stage}.ckpt"):
        if path.is_file():
            checkpoint = load_checkpoint(path)
            if checkpoint.get("polymodal", {}).get("stage", stage) == stage:
                module.load_state_dict(checkpoint["state_dict"])
                return


def fit_and_test(
    module: TaskModule,
    data: L.LightningDataModule,
    config: TrainerConfig,
    run: Run,
    callbacks: Sequence[L.Callback] = (),
    **options: Unpack[StageOptions],
) -> dict[str, float]:
    """Train (or resume), load the best weights, test; returns the ``test/`` metrics. Arguments as ``build_trainer``."""
    trainer = fit(module, data, config, run, callbacks, **options)
    load_best(module, run, options.get("stage", 0))
    return evaluate_fitted(module, data, trainer)
