"""DivPrune: the most unlike tokens by greedy max-min diversity; no attention is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from vlm_accel.methods._features import check_ratio, gathered
from vlm_accel.methods.base import FeatureMethod
from vlm_accel.ops.cluster import cosine_distance
from vlm_accel.ops.greedy import max_min

if TYPE_CHECKING:
    from vlm_accel.methods.base import Features, Reduced

__all__ = ["DivPrune"]


@dataclass(frozen=True)
class DivPrune(FeatureMethod):
    """Greedy max-min diversity of the projected features.

    With D = 1 - cosine: first the token whose nearest other one is farthest, then again and again the one farthest from
    its nearest chosen one, round(ratio * N) in all.

    Deviation: every tile of an anyres picture is pruned by itself (the official code takes all tiles and newlines of a
    sample together), so that newlines are never ranked.

    Args:
        ratio: share kept, in (0, 1]; .098 as published for LLaVA-1.5.

    Raises:
        UserError: ratio out of range.

    Source: Alvar et al. 2025, arXiv 2503.02175 (CVPR 2025); rule as in iLLaVA 5 (read in the authors' code).
    """

    after_projector: ClassVar[bool] = True

    ratio: float = 0.098

    def __post_init__(self) -> None:
        check_ratio("divprune", self.ratio)

    def blocks(self, depth: int, used: int) -> tuple[int, ...]:
        """No block: only the features count."""
        return ()

    def count(self, tokens: int) -> int:
        """round(ratio * tokens), at least 1."""
        return min(tokens, max(1, round(self.ratio * tokens)))

    def select(self, features: Features) -> list[Reduced]:
        """One answer an image; all keep the same number."""
        x = features.x
        images, tokens = x.shape[:2]
        keep = self.count(tokens)
        if keep == tokens:
            return gathered(features, torch.arange(tokens, device=x.device).expand(images, tokens))
        return gathered(features, max_min(cosine_distance(x, x), keep))
