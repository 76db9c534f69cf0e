"""FedDyn: a dynamic regulariser that aligns the clients' minima with the global one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedcore.algorithm import Algorithm, Client, Context, GradFn, Local, Step, Tree
from fedcore.ops.schedule import descend

__all__ = ["FedDyn"]


@dataclass(frozen=True, kw_only=True)
class FedDyn(Algorithm):
    """Clients minimise ``L_i - <h_i, theta> + (a/2) |theta - theta_{t-1}|^2``.

    ``h_i <- h_i - a (theta^i_K - theta_{t-1})`` stays with the client, zero before its first round; the server keeps
    ``h <- h - (a/N) sum_S (theta^i_K - theta_{t-1})``, the mean of all of them, and moves to
    ``mean_i theta^i_K - h/a``. Both terms enter the gradient, after clipping (official scripts of later papers leave
    them out of it). Sends P floats each way; a client keeps P.

    In the first round the local models are those of FedProx with ``mu=a``. Where every client reaches a stationary
    point of its objective, ``h_i`` is the gradient of its loss there.

    Source: Acar et al. 2021, arXiv 2111.04263, Algorithm 1.

    Args:
        a: weight of the regulariser, more than 0 (0.01; the comparisons use up to 0.1).
    """

    keeps_state: ClassVar[bool] = True

    a: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("a", self.a > 0, "more than 0, since the server divides by it; use fedavg instead of 0")

    def server_init(self, params: Tensor) -> Tree:
        """``h`` (P,), zero."""
        return {"h": torch.zeros_like(params)}

    def client_init(self, ctx: Context, client: Client) -> Tree:
        """``h`` (P,), zero."""
        return {"h": torch.zeros(self.spec.numel, dtype=self.spec.dtype)}

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Local]:
        """``h_i + a theta_{t-1}``, the constant part of both terms."""
        return params, Local(own={"pull": torch.add(state["h"], params, alpha=self.a)})

    def local_step(self, params: Tensor, grad_fn: GradFn, batch: Any, local: Local, step: Step) -> tuple[Tensor, Local]:
        """SGD along ``g - h_i + a (theta - theta_{t-1})``."""
        grad = self.gradient(params, grad_fn, batch, step)
        grad.add_(params, alpha=self.a).sub_(local.own["pull"])
        return descend(params, grad, step.lr), local

    def local_finish(
        self, start: Tensor, params: Tensor, message: Tree, state: Tree, local: Local, ctx: Context
    ) -> tuple[Tree, Tree]:
        """Move to the server; the client keeps its dual variable."""
        delta = params - start
        return {"delta": delta}, {"h": torch.sub(state["h"], delta, alpha=self.a)}

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Average, corrected by the mean dual variable of all clients, sampled or not."""
        share = ctx.cohort / ctx.num_clients
        dual = torch.sub(server["h"], reduced["delta"], alpha=self.a * share)
        return (params + reduced["delta"]).sub_(dual, alpha=1.0 / self.a), {"h": dual}
