"""Configuration of ``slt-train``: what ``--help`` lists and YAML presets set. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polymodal.config import RunConfig
from polymodal.errors import UserError

from slt.config import LossConfig, ModelConfig
from slt.data.base import SLTData
from slt.data.options import LoaderConfig
from slt.data.synthetic import Synthetic

__all__ = ["AuditConfig", "DecodeConfig", "OptimConfig", "SLTConfig", "TokenizerConfig"]


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule of a stage."""

    optimizer: Literal["adamw", "sgd"] = "sgd"
    """sgd is GFSLT-VLP's, adamw trains small models"""
    lr: float = 0.01
    """peak learning rate per optimizer step"""
    weight_decay: float = 1e-3
    """decay of matrices and kernels (biases and norms have none)"""
    momentum: float = 0.9
    """of sgd"""
    betas: tuple[float, float] = (0.9, 0.98)
    """of adamw"""
    warmup: float = 0.0
    """share of all steps with linear warm-up, 0..1"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """after warm-up"""
    min_lr: float = 1e-8
    """end of the cosine"""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"lr={self.lr}; expected more than 0")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"warmup={self.warmup}; expected 0..1, a share of all steps")
        if self.weight_decay < 0:
            raise UserError(f"weight_decay={self.weight_decay}; expected 0 or more")
        if not 0 <= self.min_lr <= self.lr:
            raise UserError(f"min_lr={self.min_lr}; expected 0..{self.lr}, the peak lr")


@dataclass
class TokenizerConfig:
    """Text units of the model."""

    kind: Literal["auto", "word", "char", "pretrained"] = "auto"
    """auto: pretrained with a path, else words (characters for Chinese) of the training texts"""
    path: Path | None = None
    """folder of an mBART tokenizer, trimmed or not (slt-data trim)"""
    min_count: int = 1
    """rarer words become <unk>"""


@dataclass
class DecodeConfig:
    """How translations are searched."""

    beams: int = 4
    """beam width at test"""
    val_beams: int = 4
    """beam width in validation (1: greedy, faster)"""
    length_penalty: float = 1.0
    """exponent of the length in the beam score"""
    max_new_tokens: int = 0
    """longest translation; 0: 1.5 times the longest training target"""

    def __post_init__(self) -> None:
        for name, least in (("beams", 1), ("val_beams", 1), ("max_new_tokens", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}; expected at least {least}")


@dataclass
class AuditConfig:
    """What is scored next to the model, so that a leaking question shows."""

    enabled: bool = True
    """copy_question, question_1nn, shuffled and empty questions, overlap rate"""
    question_only: bool = True
    """train a model that never sees the video (fast: no frames) and score it too"""
    samples: int = 8
    """translations shown at the end and logged as a table"""


@dataclass
class SLTConfig(RunConfig):
    """Question-based sign language translation."""

    stage: Literal["2", "1", "both"] = "both"
    """1 aligns, 2 translates, both does 1, transfers the weights strictly, then 2"""
    stage1_epochs: int = 80
    """epochs of stage 1 (trainer.max_epochs is stage 2's)"""
    stage1_batch_size: int = 0
    """clips in a training batch of stage 1 (0: loader.batch_size)"""
    stage1_checkpoint: Path | None = None
    """start stage 2 from this stage-1 run folder or checkpoint"""
    data: SLTData = field(default_factory=Synthetic, metadata={"class_typed": True})
    """reader of the data set"""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim1: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.0))
    optim: OptimConfig = field(default_factory=OptimConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
