"""DP-FedAvg: local SGD under client-level differential privacy, with server momentum or smoothing where asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcore.algorithm import Context, Tree
from fedcore.algorithms._private import PrivateAlgorithm, spans
from fedcore.ops.laplacian import smooth_spans

__all__ = ["DPFedAvg"]


@dataclass(frozen=True, kw_only=True)
class DPFedAvg(PrivateAlgorithm):
    """Clients run SGD and upload their move; the server adds the noisy mean of the clipped moves.

    ``theta <- theta + h`` with ``h = (sum_i clip(theta^i_K - theta, C) + sigma C z) / (q N)``. Two options work on what
    was released and cost no privacy: ``server_momentum`` b (DP-FedAvgM: ``m <- b m + h``, ``theta <- theta + m``) and
    ``smoothing`` s (DP-FedAvg-LS: ``h <- (I - s L)^{-1} h``, before the momentum). Momentum adds up to steps 1/(1-b)
    times as long: lower the rate or the clip with it. Without noise and clipping it is FedAvg.

    Source: McMahan et al. 2018, arXiv 1710.06963, Algorithm 1 (fixed denominator, uniform weights); smoothing from
    Liang et al. 2020, arXiv 2005.00218, applied to the flattened tensors one by one.

    Args:
        server_momentum: b, 0 <= b < 1 (0: none).
        smoothing: s, strength of the Laplacian smoothing (0: none).
    """

    server_momentum: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("server_momentum", 0 <= self.server_momentum < 1, "0 (none) <= server_momentum < 1")
        self.check("smoothing", 0 <= self.smoothing < math.inf, "0 (none) or more")

    def server_init(self, params: Tensor) -> Tree:
        """``momentum`` (P,), zero, where there is one."""
        return {"momentum": torch.zeros_like(params)} if self.server_momentum else {}

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Smooth, add to the momentum, move."""
        move = smooth_spans(reduced["delta"], spans(self.spec), self.smoothing)
        if not self.server_momentum:
            return params + move, server
        momentum = torch.add(move, server["momentum"], alpha=self.server_momentum)
        return params + momentum, {"momentum": momentum}
