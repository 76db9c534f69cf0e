"""FasterVLM: the most attended tokens, dropped before the projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_accel.methods._features import attention, check_ratio, gathered, share
from vlm_accel.methods.base import FeatureMethod
from vlm_accel.ops._select import ranked

if TYPE_CHECKING:
    from vlm_accel.methods.base import Features, Reduced

__all__ = ["FasterVLM"]


@dataclass(frozen=True)
class FasterVLM(FeatureMethod):
    """Keep the top by head-mean CLS attention in the last block whose output the model reads; drop the others.

    Deviations: without a CLS row (SigLIP, Qwen) attention received takes its place; of equal scores the lower index
    stays. Each tile keeps the same number, as in the official code.

    Args:
        ratio: share kept, in (0, 1]. Published: .5, .25, .1, .05.

    Raises:
        UserError: ratio out of range.

    Source: Zhang et al. 2024, arXiv 2412.01818v1; iLLaVA 5.
    """

    ratio: float = 0.25

    def __post_init__(self) -> None:
        check_ratio("fastervlm", self.ratio)

    def count(self, tokens: int) -> int:
        """The share of ``tokens``."""
        return share(tokens, self.ratio)

    def select(self, features: Features) -> list[Reduced]:
        """One answer an image; all keep the same number."""
        order = ranked(attention(features, max(features.cls_attention)))
        return gathered(features, order[:, : self.count(features.x.shape[1])].sort(-1).values)
