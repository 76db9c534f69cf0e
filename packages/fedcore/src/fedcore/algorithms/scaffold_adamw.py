"""SCAFFOLD-AdamW: AdamW on the clients, fed with gradients corrected by control variates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedcore.algorithm import Client, Context, Local, Step, Tree
from fedcore.algorithms._adam import AdamFamily

__all__ = ["ScaffoldAdamW"]


@dataclass(frozen=True, kw_only=True)
class ScaffoldAdamW(AdamFamily):
    """Local AdamW on ``g - c_i + c``; ``c_i`` becomes the mean of the clipped gradients that the client met.

    SCAFFOLD's own rule for ``c_i`` takes the move of the parameters for a gradient, which it is not under Adam. The
    server adds ``(s/N) mean_i (c_i^+ - c_i)`` to ``c``. Moments start every round from zero; decay is no part of the
    variates. Its first round has the parameters of ``local_adamw``; with one client it is ``local_adamw`` in all. Sends
    2 P floats each way; a client keeps P, zero before its first round.

    Source: baseline of the FedAdamW paper, arXiv 2510.27486, after SCAFFOLD: Karimireddy et al. 2020, arXiv 1910.06378.
    """

    keeps_state: ClassVar[bool] = True

    def server_init(self, params: Tensor) -> Tree:
        """``c`` (P,), zero."""
        return {"c": torch.zeros_like(params)}

    def client_init(self, ctx: Context, client: Client) -> Tree:
        """``c`` (P,), zero."""
        return {"c": torch.zeros(self.spec.numel, dtype=self.spec.dtype)}

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Local]:
        """The correction ``c - c_i``, and a place for the sum of the gradients."""
        correction = message["c"] - state["c"]
        return params, Local(own={"correction": correction, "sum": torch.zeros_like(correction)})

    def adjusted(self, grad: Tensor, local: Local, step: Step) -> Tensor:
        """Add the gradient to the sum, and the correction to the gradient."""
        local.own["sum"].add_(grad)
        return grad.add_(local.own["correction"])

    def local_finish(
        self, start: Tensor, params: Tensor, message: Tree, state: Tree, local: Local, ctx: Context
    ) -> tuple[Tree, Tree]:
        """Move and ``c_i^+ - c_i`` to the server; the client keeps ``c_i^+``."""
        fresh = local.own["sum"] / ctx.steps
        return {"delta": params - start, "variate": fresh - state["c"]}, {"c": fresh}

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Average, and the share of the clients seen moves ``c``."""
        share = ctx.cohort / ctx.num_clients
        return params + reduced["delta"], {"c": torch.add(server["c"], reduced["variate"], alpha=share)}
