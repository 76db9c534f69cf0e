"""FedAdam: the server takes the mean move of the clients for the gradient of Adam."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcore.algorithm import Algorithm, Context, Tree

__all__ = ["FedAdam"]


@dataclass(frozen=True, kw_only=True)
class FedAdam(Algorithm):
    """Local SGD as in FedAvg; the server steps with moments of the mean move ``D`` of the round.

    ``m <- b1 m + (1-b1) D``, ``v <- b2 v + (1-b2) D^2``, ``theta <- theta + eta_s m / (sqrt(v) + tau)``, with m = 0 and
    v = tau^2 at the start and no bias correction, as in the paper. With ``b1=0, b2=1, v0=1`` and a tau of nearly 0 it
    is FedAvg with the server rate ``eta_s``.

    Args:
        eta_s: server rate; to be searched from 0.01 to 0.1 (0.01 is what the authors of FedAdamW run).
        b1: decay of the mean.
        b2: decay of the mean square.
        tau: what the denominator is at least; how adaptive the method is.
        v0: v before round 0; None is tau^2. Flower starts at 0.
        bias_correction: multiply ``eta_s`` by ``sqrt(1 - b2^r) / (1 - b1^r)`` in the r-th round, counted from 1.

    Source: Reddi et al. 2021, FedOpt, arXiv 2003.00295, Algorithm 2.
    """

    eta_s: float = 0.01
    b1: float = 0.9
    b2: float = 0.99
    tau: float = 1e-3
    v0: float | None = None
    bias_correction: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("eta_s", self.eta_s > 0, "more than 0")
        self.check("b1", 0 <= self.b1 < 1, "0 <= b1 < 1, 0 keeps no momentum")
        self.check("b2", 0 <= self.b2 <= 1, "0 <= b2 <= 1, 1 never changes v")
        self.check("tau", self.tau > 0, "more than 0: it keeps the step finite where v is 0")
        self.check("v0", self.v0 is None or self.v0 >= 0, "0 or more, or null for tau^2")
        self.check("bias_correction", not (self.bias_correction and self.b2 == 1), "false where b2 is 1")

    def server_init(self, params: Tensor) -> Tree:
        """First moment 0, second moment v0, each (P,)."""
        start = self.tau**2 if self.v0 is None else self.v0
        return {"m": torch.zeros_like(params), "v": torch.full_like(params, start)}

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Step along the first moment, divided by the root of the second."""
        delta = reduced["delta"]
        m = torch.lerp(delta, server["m"], self.b1)
        v = self.second_moment(server["v"], delta)
        rate = self.eta_s * (self.correction(ctx.round + 1) if self.bias_correction else 1.0)
        return torch.addcdiv(params, m, v.sqrt().add_(self.tau), value=rate), {"m": m, "v": v}

    def second_moment(self, v: Tensor, delta: Tensor) -> Tensor:
        """New second moment (P,) from the old one and the mean move (P,)."""
        return torch.lerp(delta.square(), v, self.b2)

    def correction(self, r: int) -> float:
        """Factor on the rate in the r-th round, counted from 1, that undoes the start of the moments at zero."""
        return math.sqrt(1 - self.b2**r) / (1 - self.b1**r)
