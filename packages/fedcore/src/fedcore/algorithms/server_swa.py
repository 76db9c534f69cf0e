"""Server-side stochastic weight averaging: FedAvg, evaluated at the mean of its late models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcore.algorithm import Algorithm, Context, Tree

__all__ = ["ServerSWA"]


@dataclass(frozen=True, kw_only=True)
class ServerSWA(Algorithm):
    """FedAvg with a running mean of the global models of the last rounds.

    Training is FedAvg's, bit for bit; from the first averaged round on the mean is what is evaluated, and it never
    reaches a client. Where one round is averaged it is FedAvg in all. Buffers are not averaged: with BatchNorm they
    belong to the last model, so use GroupNorm. Where the number of rounds is not known (``Simulation.round()`` without
    ``rounds``) all rounds are late ones.

    This is our reading of the server side of Caldarola et al. 2022: their rate also cycles in averaged rounds. Not the
    FedSWA of arXiv 2507.20016, which is ``fedswa``.

    Source: Caldarola et al. 2022, arXiv 2203.11834, section on SWA.

    Args:
        share: share of the rounds that is averaged, the last ones, at least one round (0.25).
    """

    share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("share", 0 < self.share <= 1, "0 < share <= 1, 0.25 averages the last quarter of the rounds")

    def server_init(self, params: Tensor) -> Tree:
        """``mean`` (P,) of the averaged models and their number ``count`` (scalar, int64)."""
        return {"mean": params.clone(), "count": torch.zeros((), dtype=torch.int64)}

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Average of the clients, then of the late rounds."""
        params = params + reduced["delta"]
        if ctx.round < ctx.rounds - max(1, round(self.share * ctx.rounds)):
            return params, server
        count = server["count"] + 1
        # lerp takes a weight of 1 exactly: the first model replaces whatever stood there.
        return params, {"mean": torch.lerp(server["mean"], params, 1.0 / int(count)), "count": count}

    def evaluation_params(self, server: Tree, params: Tensor) -> Tensor:
        """The mean, once it holds a round."""
        return server["mean"] if server["count"] else params
