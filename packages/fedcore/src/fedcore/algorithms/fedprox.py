"""FedProx: local SGD held near the model that was received."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedcore.algorithm import Algorithm, Context, GradFn, Local, Step, Tree
from fedcore.ops.schedule import descend

__all__ = ["FedProx"]


@dataclass(frozen=True, kw_only=True)
class FedProx(Algorithm):
    """Clients minimise ``L_i + (mu/2) |theta - theta_{t-1}|^2``; the server averages.

    The proximal term enters the gradient, after clipping (official scripts of later papers add it as a constant without
    one, which is FedAvg). ``mu=0`` is FedAvg, bit for bit. All clients run the given epochs: the paper's partial
    work of slow clients is not simulated.

    Source: Li et al. 2020, arXiv 1812.06127.

    Args:
        mu: weight of the proximal term (0.01, as in the comparisons of arXiv 2507.20016).
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("mu", self.mu >= 0, "0 (FedAvg) or more")

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Local]:
        """Keep the model received."""
        return params, Local(shared={"anchor": params})

    def local_step(self, params: Tensor, grad_fn: GradFn, batch: Any, local: Local, step: Step) -> tuple[Tensor, Local]:
        """SGD along ``g + mu (theta - theta_{t-1})``."""
        grad = self.gradient(params, grad_fn, batch, step)
        grad.add_(params - local.shared["anchor"], alpha=self.mu)
        return descend(params, grad, step.lr), local
