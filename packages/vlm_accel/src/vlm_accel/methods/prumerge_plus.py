"""PruMerge+: PruMerge with tokens from all over the picture besides the outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vlm_accel.methods.prumerge import PruMerge, outliers

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PruMergePlus"]


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with tokens at even distances, about four times as many.

    The tokens 0, s, 2 s, ... below N - 1 stay too, with s = int(int(1 / r) / 3) and r the share of
    outliers. s is at least 1 (official: an error where r > 1/3), so that pictures with very many outliers keep nearly
    all tokens, as the rule says.

    With ``ratio`` (our completion) a quarter of the tokens are the top ones, and the others stand at even distances in
    the list of those that are left. Options and other deviations as in PruMerge.

    Source: Shang et al. 2024, arXiv 2403.15388; rule as in iLLaVA 5 (read in the authors' code).
    """

    def chosen(self, scores: Tensor, order: Tensor) -> list[Tensor]:
        """Rows that stay of each image, ascending."""
        tokens = scores.shape[1]
        total = self.count(tokens)
        if total is not None:
            return list(_spread(order, total))
        stays = []
        for row, number in zip(order, outliers(scores), strict=True):
            stay = torch.zeros(tokens, dtype=torch.bool, device=row.device)
            stay[: tokens - 1 : max(1, tokens // number // 3)] = True
            stay[row[:number]] = True
            stays.append(stay.nonzero().squeeze(-1))
        return stays


def _spread(order: Tensor, total: int) -> Tensor:
    """(I, max(1, total - 1)) rows: a quarter by score, the others evenly spaced among the rest in raster order."""
    number = max(1, total - 1)
    top = max(1, round(number / 4))
    rest = order[:, top:].sort(-1).values
    spots = torch.arange(number - top, device=order.device) * rest.shape[1] // max(1, number - top)
    return torch.cat([order[:, :top], rest[:, spots]], 1).sort(-1).values
