"""FedLESAM: sharpness-aware steps along a global direction that costs no backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedcore.algorithm import Algorithm, Client, Context, GradFn, Local, Step, Tree, clip_norm
from fedcore.ops.sam import scale_to

__all__ = ["FedLESAM"]


@dataclass(frozen=True, kw_only=True)
class FedLESAM(Algorithm):
    """The perturbation is the way the global model has come since the client last saw it.

    ``eps_i = r (theta_old_i - theta_{t-1}) / ||theta_old_i - theta_{t-1}||`` with the model ``theta_old_i`` that the
    client received last time; it is constant in a round and zero where the client takes part for the first time (or the
    model has not moved). Step ``theta <- theta - eta (gL(theta + eps_i) + weight_decay theta)``: one backward pass.
    ``r=0`` is FedAvg.

    The authors' script departs from the paper: every client uses the last round's global move, divided by the sum of
    the norms of the tensors. Here the paper is followed, with one norm over all tensors.

    Args:
        r: length of the perturbation.

    Source: Fan et al. 2024, arXiv 2405.18890, Algorithm 1.
    """

    keeps_state: ClassVar[bool] = True

    r: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("r", 0 <= self.r < math.inf, "0 (no perturbation) or more")

    def client_init(self, ctx: Context, client: Client) -> Tree:
        """No model seen: ``seen`` (1,) is 0 and ``last`` (P,) counts for nothing."""
        dtype = self.spec.dtype
        return {"last": torch.zeros(self.spec.numel, dtype=dtype), "seen": torch.zeros(1, dtype=dtype)}

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Local]:
        """The perturbation of the round, as ``own["eps"]`` (..., P)."""
        return params, Local(own={"eps": scale_to(state["last"] - params, self.r).mul_(state["seen"])})

    def local_step(self, params: Tensor, grad_fn: GradFn, batch: Any, local: Local, step: Step) -> tuple[Tensor, Local]:
        """SGD with the loss gradient at the perturbed point and the decay at ``params``."""
        grad, _ = grad_fn(params + local.own["eps"], batch, rng=step.rng)
        grad = clip_norm(grad, self.clip_grad)
        if self.weight_decay:
            grad.add_(params, alpha=self.weight_decay)
        return params.sub_(grad, alpha=step.lr), local

    def local_finish(
        self, start: Tensor, params: Tensor, message: Tree, state: Tree, local: Local, ctx: Context
    ) -> tuple[Tree, Tree]:
        """The move; the client keeps the model it was sent."""
        last = start.expand_as(params).clone()
        return {"delta": params - start}, {"last": last, "seen": torch.ones_like(state["seen"])}
