"""TOVA: at every step the entry that the last query looks at least goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vlm_accel.budget import KVBudget
from vlm_accel.methods.base import CacheMethod
from vlm_accel.ops.cache_scores import window_scores

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.methods.base import CacheView

__all__ = ["TOVA"]


@dataclass(frozen=True)
class TOVA(CacheMethod):
    """The last query's attention, mean over all heads of the layer; one entry goes at each step.

    Costs one query projection and one row of attention a layer and step, and the cache is copied at each step: the
    price of the rule, not of this engine. ``kv`` with an ``interval`` does not change that.

    Source: Oren et al. 2024, TOVA (arXiv 2401.06104), section 3.2; the newest entry is kept, as in NVIDIA/kvpress.
    """

    every_step: ClassVar[bool] = True
    same_for_heads: ClassVar[bool] = True

    def kv(self) -> KVBudget:
        """Half of each layer's prefill, nothing protected but the newest entry."""
        return KVBudget.ratio(0.5, sink=0, recent=1, window=1)

    def entry_scores(self, view: CacheView) -> Tensor:
        """(B, K, n), the same for all heads."""
        scores = window_scores(view, window=1, pool=1)
        return scores.mean(1, keepdim=True).expand_as(scores)
