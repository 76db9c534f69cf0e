"""SnapKV: once after the prefill, by what the last queries look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from polymodal.errors import UserError

from vlm_accel.budget import KVBudget
from vlm_accel.methods.base import CacheMethod
from vlm_accel.ops.cache_scores import window_scores

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.methods.base import CacheView

__all__ = ["SnapKV"]


@dataclass(frozen=True)
class SnapKV(CacheMethod):
    """Mean attention of the last ``window`` queries, pooled over neighbours; the window itself stays.

    Acts once after a prefill, never while decoding: the cache then grows by one entry a token, as published.

    Source: Li et al. 2024, SnapKV (arXiv 2404.14469), section 4; window, kernel and the mean over a group's heads as
    in LightVLM 5 (NVIDIA/kvpress), where the original takes the sum.

    Args:
        window: last queries that give the score (prompts shorter than that: all there are).
        pool: kernel of the average pooling, odd; 1: none.
    """

    window: int = 64
    pool: int = 5
    once: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise UserError(f"SnapKV: window={self.window}, pool={self.pool}; window from 1, pool odd and from 1")

    def kv(self) -> KVBudget:
        """Half of each layer's prefill; the window is protected by the score, so no other entries need be."""
        return KVBudget.ratio(0.5, sink=0, recent=0, window=self.window)

    def entry_scores(self, view: CacheView) -> Tensor:
        """(B, K, n): the window above everything else, its last entries highest."""
        scores = window_scores(view, self.window, self.pool)
        place = torch.arange(scores.shape[-1], device=scores.device) - (scores.shape[-1] - self.window)
        # attention is below 1, so 2 and more is above all of it
        return torch.where(place >= 0, 2.0 + place, scores)
