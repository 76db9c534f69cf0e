"""VisPruner: half of the tokens by attention, half by being unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from polymodal.errors import UserError

from vlm_accel.methods._features import attention, check_ratio, gathered, share
from vlm_accel.methods.base import FeatureMethod
from vlm_accel.ops._select import gather_rows, ranked
from vlm_accel.ops.greedy import distinct

if TYPE_CHECKING:
    from vlm_accel.methods.base import Features, Reduced

__all__ = ["VisPruner"]


@dataclass(frozen=True)
class VisPruner(FeatureMethod):
    """Important tokens by attention, diverse ones by deleting duplicates.

    Of T tokens, int(T * important) are those with most CLS attention. The others, in that order, lose duplicates:
    ``step`` at a time the even places with the largest cosine (of features before the projector) to any odd place go,
    until T - int(T * important) are left.

    Deviations: an odd number of tokens works (the official code needs even ones); without a CLS row attention received
    takes its place; on encoders with cells (Qwen, InternVL, SmolVLM) features are cells behind the projector.

    Args:
        ratio: share T / N kept, in (0, 1]. Published for N = 576: T = 128 (default), 64, 32.
        important: share of T chosen by attention, in [0, 1].
        step: tokens deleted a round.

    Raises:
        UserError: a number out of range.

    Source: Zhang et al. 2025, arXiv 2412.01818 (ICCV 2025); rule as in iLLaVA 5 (read in the authors' code).
    """

    ratio: float = 128 / 576
    important: float = 0.5
    step: int = 8

    def __post_init__(self) -> None:
        check_ratio("vispruner", self.ratio)
        if not 0 <= self.important <= 1 or self.step < 1:
            raise UserError(
                f"vispruner: important={self.important}, step={self.step}; expected a share in [0, 1] and at least 1"
            )

    def count(self, tokens: int) -> int:
        """The share of ``tokens``."""
        return share(tokens, self.ratio)

    def select(self, features: Features) -> list[Reduced]:
        """One answer an image; all keep the same number."""
        x = features.x
        total = self.count(x.shape[1])
        order = ranked(attention(features, max(features.cls_attention)))
        first = int(total * self.important)
        chosen = order[:, :first]
        if first < total:
            rest = order[:, first:]
            rows = distinct(gather_rows(x, rest), total - first, self.step)
            chosen = torch.cat([chosen, rest.gather(1, rows)], 1)
        return gathered(features, chosen.sort(-1).values)
