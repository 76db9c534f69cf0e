"""Options of the loaders. Imports no torch: it is part of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polymodal.errors import UserError

__all__ = ["LoaderConfig"]


@dataclass
class LoaderConfig:
    """How clips become batches."""

    batch_size: int = 8
    """clips in a training batch (the published run: 4 GPUs with 2 to 4 each)"""
    max_batch_frames: int | None = None
    """bound on the frames of a batch in place of batch_size; long clips then come in smaller batches"""
    eval_batch_size: int = 16
    """clips in an evaluation batch; results do not depend on it"""
    num_workers: int = 0
    """processes that decode frames; batches do not depend on it"""
    bucket: int = 8
    """batches whose clips are sorted by length together; 1: no sorting"""
    max_frames: int = 300
    """longer clips are thinned: random frames in training, evenly spaced ones in evaluation"""
    frame_size: int = 224
    """height and width that the model sees, pixels; not for poses"""
    resize: int | None = 256
    """height and width before the crop, pixels; empty: as frame_size, no crop"""
    augment: Literal["paper", "none"] = "paper"
    """training frames: paper (rotate, resize, shift, random crop; one draw a clip) or none"""
    max_question_tokens: int = 64
    """questions lose tokens at their end beyond this; end and language tag stay"""
    question_dropout: float = 0.1
    """share of training questions replaced by an empty one, 0..1 (ours)"""
    corruption: Literal["omit_last", "omit", "span"] = "omit_last"
    """which words the restoration task masks in training"""
    corruption_rate: float = 0.15
    """upper end of the masked share, 0..1"""
    frame_cache: Path | None = None
    """folder that slt-data cache wrote, with frames of size resize"""
    feature_cache: Path | None = None
    """folder of features of a frozen resnet18 (slt-data cache --what features); with model.backbone=features"""
    cache_frames: bool | None = None
    """keep decoded clips in memory; empty: where num_workers is 0 and they need at most cache_mib"""
    cache_mib: int = 1024
    """bound for cache_frames left empty, MiB"""

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size", "bucket", "max_frames", "frame_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.max_batch_frames is not None and self.max_batch_frames < 1:
            raise UserError(f"max_batch_frames={self.max_batch_frames}; expected at least 1, or nothing for batch_size")
        if self.num_workers < 0:
            raise UserError(f"num_workers={self.num_workers}; expected 0 (no processes) or more")
        if self.resize is not None and self.resize < self.frame_size:
            raise UserError(f"resize={self.resize} is below frame_size={self.frame_size}; raise it or leave it empty")
        for name in ("question_dropout", "corruption_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}; expected 0..1")
