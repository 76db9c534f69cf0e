"""Configuration of ``mm-train``: what ``--help`` lists and YAML presets set. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polymodal.config import RunConfig
from polymodal.errors import UserError

from missing_modal.data.base import MissingConfig, MMData
from missing_modal.world import World

__all__ = ["BackboneConfig", "CalibrationConfig", "LoaderConfig", "MMConfig", "OptimConfig"]


@dataclass
class BackboneConfig:
    """The frozen encoders."""

    name: str = "small"
    """small (trained on the spot, then frozen), open_clip:MODEL, hf_clip:FOLDER, vilt:FOLDER, towers:FILE"""
    weights: Path | None = None
    """file with the weights of the encoders; small: made in the cache"""
    width: int = 32
    """d of small encoders"""
    depth: int = 3
    """blocks of small encoders"""
    heads: int = 2
    """attention heads of small encoders"""
    features: int = 16
    """e of small encoders"""
    context: int = 0
    """positions of texts: most bytes of small encoders (0: 77), tokens of ViLT (0: as its weights have them)"""
    seconds: float = 1.0
    """length of sounds for small audio encoders, s"""
    steps: int = 250
    """optimizer steps of the contrastive training of small encoders (0: random weights)"""
    seed: int = 0
    """of the small encoders; the seed of a run does not change them"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """number format that frozen weights are kept in; auto: bfloat16 on a GPU under bf16-mixed, else float32"""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "features"):
            if getattr(self, name) < 1:
                raise UserError(f"backbone.{name}={getattr(self, name)}; expected at least 1")
        for name in ("steps", "context"):
            if getattr(self, name) < 0:
                raise UserError(f"backbone.{name}={getattr(self, name)}; expected 0 or more (--help backbone)")
        if self.width % self.heads:
            raise UserError(f"backbone.width={self.width} does not divide into backbone.heads={self.heads}")
        if self.weights is not None:
            self.weights = Path(self.weights).expanduser()


@dataclass
class OptimConfig:
    """AdamW and its schedule: linear warm-up, then linear to 0, per optimizer step (DCP 3.6)."""

    lr: float = 1e-2
    """rate of prompts, generators and head"""
    lr_out: float = 1e-2
    """rate of the copies of last norms and image projection"""
    lr_towers: float = 1e-4
    """rate of encoders that are fine-tuned (modality_dropout)"""
    weight_decay: float = 2e-2
    """decay of everything but biases"""
    warmup: float = 0.1
    """share of the steps with linear warm-up, 0..1"""
    betas: tuple[float, float] = (0.9, 0.98)
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""

    def __post_init__(self) -> None:
        for name in ("lr", "lr_out", "lr_towers"):
            if getattr(self, name) <= 0:
                raise UserError(f"optim.{name}={getattr(self, name)}; expected more than 0")
        if not 0 <= self.warmup < 1:
            raise UserError(f"optim.warmup={self.warmup}; expected 0 <= warmup < 1, a share of the steps")
        if self.weight_decay < 0:
            raise UserError(f"optim.weight_decay={self.weight_decay}; expected 0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={list(self.betas)}; expected two numbers, each 0 <= beta < 1")


@dataclass
class LoaderConfig:
    """How samples are batched."""

    batch_size: int = 64
    """samples in a training batch; 256 in all with trainer.accumulate is the published setting"""
    eval_batch_size: int = 256
    """samples in an evaluation batch"""
    num_workers: int = 0
    """loader processes (0: the training process decodes)"""

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"loader.{name}={getattr(self, name)}; expected at least 1")
        if self.num_workers < 0:
            raise UserError(f"loader.num_workers={self.num_workers}; expected 0 or more")


@dataclass
class CalibrationConfig:
    """Temperatures of the probabilities, fitted on the validation split after training."""

    enabled: bool = True
    """fit a temperature per pattern"""
    least: int = 50
    """validation samples that a pattern needs for a temperature of its own; below, the pooled one"""

    def __post_init__(self) -> None:
        if self.least < 1:
            raise UserError(f"calibration.least={self.least}; expected at least 1")


@dataclass
class MMConfig(RunConfig):
    """Prompt learning for missing modalities."""

    method: str = "dcp"
    """see --list-methods"""
    method_options: dict[str, Any] = field(default_factory=dict)
    """options of the method, e.g. {length: 36}"""
    defaults_by_method: dict[str, Any] = field(default_factory=dict)
    """options of methods by their names, from a preset; method_options wins"""
    data: MMData = field(default_factory=World, metadata={"class_typed": True})
    """reader of the data set"""
    missing: MissingConfig = field(default_factory=MissingConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def options_of_method(self) -> dict[str, Any]:
        """Options of the chosen method: the preset's for this method, then those given.

        Raises:
            UserError: the preset's are no mapping.
        """
        found = self.defaults_by_method.get(self.method) or {}
        if not isinstance(found, dict):
            raise UserError(f"defaults_by_method.{self.method}={found!r}; expected a mapping of options")
        return {**found, **self.method_options}
