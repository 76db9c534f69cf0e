"""Typed configuration shared by every training command. Plain dataclasses: YAML in, YAML out, no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import yaml

from polymodal.errors import UserError

__all__ = ["JobConfig", "LoggingConfig", "RunConfig", "TrainerConfig", "config_hash", "to_dict", "to_yaml"]


@dataclass
class TrainerConfig:
    """How to train; the same for every package."""

    max_epochs: int = 10
    """passes over the training data"""
    max_steps: int = -1
    """stop after so many optimizer steps (-1: by epochs)"""
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    """where to compute; auto: what is there"""
    devices: int = 1
    """number of devices (data parallel above 1)"""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    """number format of the forward and backward pass"""
    clip_grad: float = 1.0
    """largest gradient norm (0: no clipping)"""
    accumulate: int = 1
    """batches per optimizer step"""
    val_every_epochs: int = 1
    """epochs between validations"""
    patience: int = 0
    """validations without improvement before training stops (0: off)"""
    log_every_steps: int = 10
    """optimizer steps between rows of train/ and perf/ metrics"""
    checkpoint_every_epochs: int = 1
    """epochs between checkpoints (0: only by time and steps)"""
    checkpoint_every_minutes: float = 10.0
    """minutes between checkpoints (0: off)"""
    checkpoint_every_steps: int = 0
    """optimizer steps between checkpoints within an epoch (0: off)"""
    deterministic: bool = False
    """refuse non-deterministic kernels on a GPU (the CPU is deterministic anyway)"""
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    """progress display; auto: bar on a terminal, a line an epoch elsewhere"""
    extra: dict[str, Any] = field(default_factory=dict)
    """further arguments of lightning.Trainer"""

    def __post_init__(self) -> None:
        for name in ("devices", "accumulate", "val_every_epochs", "log_every_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"trainer.{name}={getattr(self, name)}; expected at least 1")
        cadence = ("checkpoint_every_epochs", "checkpoint_every_minutes", "checkpoint_every_steps")
        for name in ("clip_grad", "patience", *cadence):
            if getattr(self, name) < 0:
                raise UserError(f"trainer.{name}={getattr(self, name)}; expected 0 (off) or more")


@dataclass
class LoggingConfig:
    """Where metrics go besides metrics.csv."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """W&B: auto is online where an account is configured, else offline"""
    tensorboard: bool = False
    """write TensorBoard event files (extra: polymodal[tensorboard])"""
    project: str = ""
    """W&B project (default: the package's name)"""
    entity: str | None = None
    """W&B team or user"""
    tags: list[str] = field(default_factory=list)
    """W&B tags"""


@dataclass
class JobConfig:
    """What every command that writes a run folder has, whether it trains or only evaluates."""

    seed: int = 0
    """root seed; every random draw derives from it by name"""
    out: Path = Path("runs")
    """folder that receives runs/<task>/<name>-<time>/"""
    name: str | None = None
    """name of the run (default: made from data and method)"""
    threads: int | None = None
    """intra-op CPU threads (default 1; see README)"""
    log: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass
class RunConfig(JobConfig):
    """What every training command has; packages add their own groups in a subclass."""

    resume: str | None = None
    """run folder, checkpoint, or auto (newest unfinished run of this config)"""
    dry_run: bool = False
    """check options and data, print the plan, train nothing"""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def to_dict(value: Any) -> Any:
    """Plain data of a configuration: dataclasses to dicts, paths to strings, tuples to lists.

    A field marked ``metadata={"class_typed": True}`` becomes ``{"class_path": ..., "init_args": ...}``, the form that
    the command-line parser reads back.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = {}
        for item in dataclasses.fields(value):
            if not item.init:
                continue
            inner = getattr(value, item.name)
            plain = to_dict(inner)
            if item.metadata.get("class_typed") and inner is not None:
                cls = type(inner)
                plain = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": plain}
            result[item.name] = plain
        return result
    if isinstance(value, dict):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    return value


def to_yaml(config: Any) -> str:
    """The complete configuration as YAML that ``--config`` reads back to an equal configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def config_hash(config: JobConfig) -> str:
    """Hash of everything that changes what is trained, without seed, names and output folders.

    Runs that differ in the seed only have the same hash: it is the W&B group and what ``--resume auto`` compares
    (together with the seed).
    """
    plain = to_dict(config)
    for key in ("seed", "out", "name", "resume", "threads", "dry_run", "log"):
        plain.pop(key, None)
    plain.get("trainer", {}).pop("progress", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
