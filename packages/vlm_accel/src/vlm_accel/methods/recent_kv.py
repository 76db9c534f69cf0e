"""Control: the last entries, nothing else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from vlm_accel.budget import KVBudget
from vlm_accel.methods.base import CacheMethod

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.methods.base import CacheView

__all__ = ["RecentKV"]


@dataclass(frozen=True)
class RecentKV(CacheMethod):
    """The last b entries: StreamingLLM without its sinks.

    Source: control of LightVLM 5 (arXiv 2509.00419).
    """

    needs_queries: ClassVar[bool] = False
    same_for_heads: ClassVar[bool] = True

    def kv(self) -> KVBudget:
        """Half of each layer's prefill."""
        return KVBudget.ratio(0.5, sink=0, recent=1, window=1)

    def adapt(self, budget: KVBudget) -> KVBudget:
        """No sinks, whatever the budget says: with them it would be StreamingLLM."""
        return dataclasses.replace(budget, sink=0)

    def entry_scores(self, view: CacheView) -> Tensor:
        """(B, K, n): the later the better."""
        rows = torch.arange(view.valid.shape[-1], device=view.valid.device, dtype=torch.float32)
        return rows.expand(view.valid.shape)
