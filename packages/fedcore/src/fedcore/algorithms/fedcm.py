"""FedCM: the last global move as momentum in every local step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcore.algorithm import Algorithm, Client, Context, GradFn, Local, Step, Tree
from fedcore.ops.schedule import descend

__all__ = ["FedCM"]


@dataclass(frozen=True, kw_only=True)
class FedCM(Algorithm):
    """Local steps along ``beta g + (1 - beta) Delta``; the server averages the models.

    ``Delta = (theta_{t-1} - theta_t) / (K eta)``, the mean direction of the round before, zero in the first, whose
    steps are therefore beta times those of FedAvg. K is the mean over the clients where they differ. Sends 2 P floats
    down and P up; clients keep nothing.

    ``beta=1`` is FedAvg, bit for bit.

    Source: Xu et al. 2021, arXiv 2106.10874 (whose alpha is beta here, as in MoFedSAM).

    Args:
        beta: share of the client's own gradient, 0 < beta <= 1 (paper: 0.1).
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", 0 < self.beta <= 1, "0 < beta <= 1, 1 is FedAvg")

    def server_init(self, params: Tensor) -> Tree:
        """``momentum`` (P,), zero."""
        return {"momentum": torch.zeros_like(params)}

    def broadcast(self, server: Tree, params: Tensor, ctx: Context, client: Client) -> tuple[Tensor, Tree]:
        """Model and momentum."""
        return params, {"momentum": server["momentum"]}

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Local]:
        """Keep the momentum."""
        return params, Local(shared={"momentum": message["momentum"]})

    def local_step(self, params: Tensor, grad_fn: GradFn, batch: Any, local: Local, step: Step) -> tuple[Tensor, Local]:
        """SGD along the mixture of gradient and momentum."""
        grad = self.gradient(params, grad_fn, batch, step).mul_(self.beta)
        grad.add_(local.shared["momentum"], alpha=1.0 - self.beta)
        return descend(params, grad, step.lr), local

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Average, and the mean move turned into a gradient."""
        return params + reduced["delta"], {"momentum": reduced["delta"] / -(ctx.steps * ctx.lr)}
