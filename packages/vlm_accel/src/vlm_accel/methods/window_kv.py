"""LightVLM's cache rule as a method of its own, to be joined with any token method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_accel.methods.base import CacheMethod, CacheView

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WindowKV"]


@dataclass(frozen=True)
class WindowKV(CacheMethod):
    """Keeps the entries that the last queries attend to, while decoding too; window and pooling are the budget's.

    Degenerate case: a budget of at least the cache's length changes nothing.

    Source: Hu et al. 2025, LightVLM (arXiv 2509.00419); the rule (LightVLM 3.6) is our reading, as the paper only says
    that unnecessary entries are removed.
    """

    def entry_scores(self, view: CacheView) -> Tensor:
        """Attention of the last queries, (B, K, n) float32."""
        from vlm_accel.ops.cache_scores import window_scores

        return window_scores(view)
