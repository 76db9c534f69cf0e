"""HiRED: a token budget for a picture, shared over its tiles by where the first block looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from polymodal.errors import UserError

from vlm_accel.methods._features import check_ratio, gathered, images, one_hot
from vlm_accel.methods.base import FeatureMethod
from vlm_accel.ops._select import gather_rows, owners, ranked, wide

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.methods.base import Features, Reduced

__all__ = ["HiRED"]


@dataclass(frozen=True)
class HiRED(FeatureMethod):
    """A budget of tokens for each picture, spent tile by tile.

    A0, A_last = CLS attention of the first block and of the one that the model reads, summed over heads. A picture
    of a base row and tiles has B = int(rows * N * ratio) tokens; its base keeps F = min(int(base_share * B), N) by
    A_last. The top int(voters * N) base patches by A0 vote for the tile in which they lie; a tile keeps
    min(N, int(its share of votes * (B - F))) by A_last, which may be none. Drop only.

    Deviations: a picture of one row keeps its whole budget (half of it would be lost by the rule above); ``rows``
    counts the base as well, so that .2 is a fifth of all tokens; every base keeps at least one token; ratio 1 keeps
    all. Without a CLS row attention received takes its place.

    Args:
        ratio: share of all tokens that the budget is, in (0, 1].
        base_share: share of the budget that the base row gets, in (0, 1].
        voters: share of base patches that vote, in (0, 1].

    Raises:
        UserError: a share out of range.

    Source: Arif et al. 2024, arXiv 2408.10945 (AAAI 2025); rule as in iLLaVA 5 (read in the authors' code).
    """

    ratio: float = 0.2
    base_share: float = 0.5
    voters: float = 0.5

    def __post_init__(self) -> None:
        check_ratio("hired", self.ratio)
        for name in ("base_share", "voters"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"hired: {name}={getattr(self, name)}; expected a share in (0, 1]")

    def blocks(self, depth: int, used: int) -> tuple[int, ...]:
        """The first block votes, the one that the model reads ranks."""
        return (0, used) if used else (0,)

    def count(self, tokens: int) -> int | None:
        """All of them with ratio 1; otherwise the votes decide."""
        return tokens if self.ratio == 1 else None

    def select(self, features: Features) -> list[Reduced]:
        """One answer a row: base and tiles alike."""
        rows, tokens = features.x.shape[:2]
        if self.ratio == 1:
            return gathered(features, torch.arange(tokens, device=features.x.device).expand(rows, tokens))
        order = ranked(wide(features.cls_attention[max(features.cls_attention)]).sum(1))
        if features.groups is None:
            return gathered(features, order[:, : max(1, int(tokens * self.ratio))].sort(-1).values)
        budgets = [0] * rows
        for group in features.groups:
            self._spend(features, group, budgets)
        return [_kept_rows(features, order, image, budget) for image, budget in enumerate(budgets)]

    def _spend(self, features: Features, group: tuple[int, list[int], tuple[int, int]], budgets: list[int]) -> None:
        """Write the number of tokens that each row of one picture keeps."""
        base, tiles, layout = group
        tokens = features.x.shape[1]
        if not tiles:
            budgets[base] = max(1, int(tokens * self.ratio))
            return
        budget = int((1 + len(tiles)) * tokens * self.ratio)
        budgets[base] = max(1, min(int(self.base_share * budget), tokens))
        votes = self._votes(features, base, layout)
        left = max(0, budget - budgets[base])
        for tile, cast in zip(tiles, votes, strict=True):
            budgets[tile] = min(tokens, cast * left // max(1, sum(votes)))

    def _votes(self, features: Features, base: int, layout: tuple[int, int]) -> list[int]:
        """Votes for each tile, row by row."""
        if features.grid is None:
            raise UserError("hired: the encoder tells no patch grid, so tiles cannot be voted for; use fastervlm")
        first = wide(features.cls_attention[min(features.cls_attention)][base]).sum(0)
        voters = ranked(first[None])[0, : max(1, int(self.voters * len(first)))]
        height, width = features.grid
        tile = voters // width * layout[0] // height * layout[1] + voters % width * layout[1] // width
        # how many tokens a tile keeps shapes what follows: the one place where the device is asked
        votes: list[int] = torch.bincount(tile, minlength=layout[0] * layout[1]).tolist()
        return votes


def _kept_rows(features: Features, order: Tensor, image: int, budget: int) -> Reduced:
    """The top ``budget`` rows of one image."""
    x = features.x[image : image + 1]
    kept = order[image : image + 1, :budget].sort(-1).values
    tokens = x.shape[1]
    left = x if budget == tokens else gather_rows(x, kept)
    if not features.trace:
        return images(left, kept)[0]
    return images(left, kept, owners(kept, tokens), one_hot(kept, tokens))[0]
