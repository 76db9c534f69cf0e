"""Options of the loaders. No torch: it is part of the CLI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polymodal.errors import UserError

__all__ = ["LoaderConfig"]


@dataclass
class LoaderConfig:
    """How pictures are read, augmented and batched."""

    batch_size: int = 24
    """pictures in a training batch"""
    eval_batch_size: int = 8
    """pictures in an evaluation batch (1 where they keep their own sizes)"""
    crop: int = 512
    """side of training and evaluation crops, pixels"""
    scale: tuple[float, float] = (0.5, 2.0)
    """random resized crop: share of the picture's area"""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """random resized crop: width by height"""
    flip: float = 0.5
    """probability of a horizontal flip in training"""
    eval_size: Literal["crop", "native"] = "crop"
    """evaluate on the central crop of the picture resized to crop (the published protocol), or on whole pictures"""
    num_workers: int = 0
    """loader processes (0: the training process decodes)"""
    saliency: Path | None = None
    """folder with <id>.png saliency maps (above 127: salient), for SSUL"""
    unseen_as: Literal["background", "ignore"] = "background"
    """label of classes not learnt yet in test pictures (MiB: ignore)"""

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size", "crop"):
            if getattr(self, name) < 1:
                raise UserError(f"loader.{name}={getattr(self, name)}; expected at least 1")
        if self.num_workers < 0:
            raise UserError(f"loader.num_workers={self.num_workers}; expected 0 or more")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"loader.{name}={[low, high]}; expected 0 < first <= second")
        if not 0 <= self.flip <= 1:
            raise UserError(f"loader.flip={self.flip}; expected a probability, 0..1")
