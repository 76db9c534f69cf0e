"""FedACG: clients start where the server's momentum would take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcore.algorithm import Algorithm, Client, Context, GradFn, Local, Step, Tree
from fedcore.ops.schedule import descend

__all__ = ["FedACG"]


@dataclass(frozen=True, kw_only=True)
class FedACG(Algorithm):
    """Accelerated client gradient: look-ahead start, proximal term towards it, momentum on the server.

    Clients receive ``look = theta + lam m`` and minimise ``L_i + (b/2) |theta - look|^2``; then
    ``m <- lam m + mean_i (theta^i_K - look)`` and ``theta <- theta + m``. What is sent is the look-ahead, so that a
    round costs P floats each way, like FedAvg. The proximal term enters the gradient, after clipping. ``theta`` itself
    is what is evaluated.

    ``lam=0`` is FedProx with ``mu=b``; ``lam=0, b=0`` is FedAvg, bit for bit.

    Source: Kim et al. 2024, arXiv 2201.03172, Algorithm 1.

    Args:
        lam: momentum of the server, 0 <= lam < 1 (0.85, as in the comparisons of arXiv 2507.20016).
        b: weight of the proximal term (0.01, from the same).
    """

    lam: float = 0.85
    b: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("lam", 0 <= self.lam < 1, "0 <= lam < 1, 0 has no momentum")
        self.check("b", self.b >= 0, "0 or more")

    def server_init(self, params: Tensor) -> Tree:
        """``m`` (P,), zero."""
        return {"m": torch.zeros_like(params)}

    def broadcast(self, server: Tree, params: Tensor, ctx: Context, client: Client) -> tuple[Tensor, Tree]:
        """The look-ahead."""
        return torch.add(params, server["m"], alpha=self.lam), {}

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Local]:
        """Keep the look-ahead."""
        return params, Local(shared={"anchor": params})

    def local_step(self, params: Tensor, grad_fn: GradFn, batch: Any, local: Local, step: Step) -> tuple[Tensor, Local]:
        """SGD along ``g + b (theta - look)``."""
        grad = self.gradient(params, grad_fn, batch, step)
        grad.add_(params - local.shared["anchor"], alpha=self.b)
        return descend(params, grad, step.lr), local

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Heavy-ball step from the model itself, not from the look-ahead."""
        momentum = torch.add(reduced["delta"], server["m"], alpha=self.lam)
        return params + momentum, {"m": momentum}
