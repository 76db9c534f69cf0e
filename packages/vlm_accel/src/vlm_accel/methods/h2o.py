"""H2O: the heavy hitters among all queries so far, and the recent half."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional as F

from vlm_accel.methods.base import CacheMethod
from vlm_accel.ops.cache_scores import attention_sums

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.methods.base import CacheView

__all__ = ["H2O"]


@dataclass(frozen=True)
class H2O(CacheMethod):
    """Keep the last half of the budget, and of the others those that all queries so far attended to most.

    An entry's score is the sum of the attention it got, divided by the number of queries that could see it: without the
    division early entries win by their age alone (LightVLM 5). The sums run on through decoding; queries are added
    before entries go, so each is counted with everything it saw. No attention map is kept.

    Source: Zhang et al. 2023, H2O (arXiv 2306.14048), algorithm 1; the division as in NVIDIA/kvpress.

    Args:
        normalise: divide by the number of queries; False: the paper's plain sums.
    """

    normalise: bool = True
    observes: ClassVar[bool] = True

    def observe(self, view: CacheView) -> None:
        """Add the attention of ``view.queries`` to the running sums (B, K, n)."""
        sums, seen = attention_sums(view)
        for name, new in (("h2o_sums", sums), ("h2o_seen", seen)):
            old = view.state.get(name)
            view.state[name] = new if old is None else new + F.pad(old, (0, new.shape[-1] - old.shape[-1]))

    def entry_scores(self, view: CacheView) -> Tensor:
        """(B, K, n): mean (or summed) attention; the last ``entries // 2`` above all of it, the last one highest."""
        scores = view.state["h2o_sums"]
        if self.normalise:
            scores = scores / view.state["h2o_seen"].clamp(min=1)
        place = torch.arange(scores.shape[-1], device=scores.device) - (scores.shape[-1] - view.entries // 2)
        return torch.where(place >= 0, 1e9 * (1.0 + place), scores)
