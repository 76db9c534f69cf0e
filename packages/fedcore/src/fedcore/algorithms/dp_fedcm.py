"""DP-FedCM: the last released move as momentum in every local step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedcore.algorithm import Context, Tree
from fedcore.algorithms._private import PrivateAlgorithm
from fedcore.algorithms.fedcm import FedCM

__all__ = ["DPFedCM"]


@dataclass(frozen=True, kw_only=True)
class DPFedCM(FedCM, PrivateAlgorithm):
    """FedCM whose momentum comes from released moves; the whole move is clipped.

    It is DP-FedPGN without its residual: the move holds the part ``(1 - beta) K eta Delta`` that everybody knows, which
    takes up the clip. Compared with DP-FedPGN it shows what leaving that part out is worth. Without noise and clipping
    it is FedCM; ``beta=1`` is DP-FedAvg. How it is made private is our reading.

    Source: Xu et al. 2021, arXiv 2106.10874 (whose alpha is beta here).

    Args:
        beta: share of the client's own gradient, 0 < beta <= 1.
    """

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """As FedCM, with the public K."""
        return super().server_step(server, params, reduced, replace(ctx, steps=ctx.max_steps))
