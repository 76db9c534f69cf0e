"""SCAFFOLD: control variates against client drift."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedcore.algorithm import Algorithm, Client, Context, GradFn, Local, Step, Tree
from fedcore.ops.schedule import descend, rate_sum

__all__ = ["Scaffold"]


@dataclass(frozen=True, kw_only=True)
class Scaffold(Algorithm):
    """Local steps along ``g_i - c_i + c``, with the variates of option II.

    ``c_i^+ = c_i - c + (theta_{t-1} - theta^i_K) / (K eta)``, the mean of the gradients met on the way; the server adds
    ``(s/N) mean_i (c_i^+ - c_i)`` to ``c``, which stays the mean of all clients' variates, and averages the models.
    Gradients are clipped before the correction; decay is part of ``c_i``. Sends 2 P floats each way; a client keeps P,
    zero before its first round.

    The first round has the parameters of FedAvg. With one client it is FedAvg in all.

    Source: Karimireddy et al. 2020, arXiv 1910.06378, Algorithm 1, option II, global rate 1.
    """

    keeps_state: ClassVar[bool] = True

    def server_init(self, params: Tensor) -> Tree:
        """``c`` (P,), zero."""
        return {"c": torch.zeros_like(params)}

    def client_init(self, ctx: Context, client: Client) -> Tree:
        """``c`` (P,), zero."""
        return {"c": torch.zeros(self.spec.numel, dtype=self.spec.dtype)}

    def broadcast(self, server: Tree, params: Tensor, ctx: Context, client: Client) -> tuple[Tensor, Tree]:
        """Model and ``c``."""
        return params, {"c": server["c"]}

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Local]:
        """The correction ``c - c_i``, the same in all steps."""
        return params, Local(own={"correction": message["c"] - state["c"]})

    def local_step(self, params: Tensor, grad_fn: GradFn, batch: Any, local: Local, step: Step) -> tuple[Tensor, Local]:
        """SGD along ``g - c_i + c``."""
        grad = self.gradient(params, grad_fn, batch, step).add_(local.own["correction"])
        return descend(params, grad, step.lr), local

    def local_finish(
        self, start: Tensor, params: Tensor, message: Tree, state: Tree, local: Local, ctx: Context
    ) -> tuple[Tree, Tree]:
        """Move and ``c_i^+ - c_i`` to the server; the client keeps ``c_i^+``."""
        delta = params - start
        fresh = (-delta).div_(rate_sum(ctx.lr, ctx.steps, 1.0)).sub_(local.own["correction"])
        return {"delta": delta, "variate": fresh - state["c"]}, {"c": fresh}

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Average, and the share of the clients seen moves ``c``."""
        share = ctx.cohort / ctx.num_clients
        return params + reduced["delta"], {"c": torch.add(server["c"], reduced["variate"], alpha=share)}
