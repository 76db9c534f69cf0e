"""DP-FedPGN: local steps lean to the privately estimated global gradient, whose share is not clipped again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcore.algorithm import Client, Context, GradFn, Local, Step, Tree, clip_norm
from fedcore.algorithms._private import PrivateAlgorithm, spans
from fedcore.ops.laplacian import smooth_spans
from fedcore.ops.sam import scale_to
from fedcore.ops.schedule import descend

__all__ = ["DPFedPGN"]

USUAL_NORM = 1.0
"""norm of the mean gradient beyond which few clients get: a guess, of which only a warning depends"""


@dataclass(frozen=True, kw_only=True)
class DPFedPGN(PrivateAlgorithm):
    """Penalises the norm of the global gradient, by its last private estimate c.

    A client steps along ``gamma g + (1 - gamma) c + weight_decay theta`` and uploads the residual
    ``r_i = theta - theta^i_K - b``, without the part ``b = (1 - gamma) K eta c`` that everybody knows. With
    ``h = (sum_i clip(r_i, C) + sigma C z) / (q N)`` the server does ``step = h + b``, ``theta <- theta - step``,
    ``c <- step / (K eta)``; so ``c <- (1 - gamma) c + h / (K eta)`` and ``theta <- theta - K eta c``. A round releases
    one vector; theta and c follow from it. K and eta are public, eta that of the round. c is zero at the start.

    Without noise and clipping it is FedCM with ``beta = gamma`` (whose decay is scaled by beta too: give it
    ``weight_decay / gamma``); ``gamma=1`` is DP-FedAvg. Noise stays in c and adds up to 1/gamma times that of DP-FedAvg
    with the same C. Residuals are about gamma times as long as moves: C must shrink with gamma, or little is left of
    the signal.

    The paper's body was not to be had: the update is that of the authors' script, the privatisation is our reading,
    which has a finite epsilon (their clip depends on each client's data and has none, see ``privacy.clip_mode``).

    Source: Liu et al. 2025, arXiv 2510.27504; script of commit 6203180; smoothing (-LS) in the implicit form, see
    ``fedcore.ops.laplacian``.

    Args:
        gamma: share of the client's own gradient, 0 < gamma <= 1.
        r: length of the ascent along c before the gradient is taken (0, as in the registered script: none).
        smoothing: s, strength of the Laplacian smoothing of h (0: none).
    """

    gamma: float = 0.2
    r: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("gamma", 0 < self.gamma <= 1, "0 < gamma <= 1, 1 is DP-FedAvg")
        self.check("r", 0 <= self.r < math.inf, "0 (none) or more")
        self.check("smoothing", 0 <= self.smoothing < math.inf, "0 (none) or more")

    def clip_warning(self, clip: float, steps: int, lr: float) -> str:
        """Where C is longer than ``gamma K eta``, the residual of a client whose mean gradient has norm one."""
        reach = self.gamma * steps * lr * USUAL_NORM
        if self.gamma == 1 or clip <= reach:
            return ""
        return (
            f"privacy.clip={clip:g} is not scaled with gamma={self.gamma:g}: residuals are about gamma times as long "
            f"as DP-FedAvg's moves, while noise adds up to {1 / self.gamma:.3g} times that of DP-FedAvg; start from "
            f"gamma times its clip, here at most about gamma K eta = {reach:.3g}"
        )

    def empty_upload(self, params: Tensor, ctx: Context) -> Tree:
        """``residual`` (P,)."""
        return {"residual": torch.zeros_like(params)}

    def server_init(self, params: Tensor) -> Tree:
        """``c`` (P,), zero."""
        return {"c": torch.zeros_like(params)}

    def broadcast(self, server: Tree, params: Tensor, ctx: Context, client: Client) -> tuple[Tensor, Tree]:
        """Model and c."""
        return params, {"c": server["c"]}

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Local]:
        """Keep c, and the ascent along it."""
        shared = {"c": message["c"]}
        if self.r:
            shared["ascent"] = scale_to(message["c"].clone(), self.r)
        return params, Local(shared=shared)

    def local_step(self, params: Tensor, grad_fn: GradFn, batch: Any, local: Local, step: Step) -> tuple[Tensor, Local]:
        """SGD along the mixture, with decay at full strength."""
        point = params + local.shared["ascent"] if self.r else params
        grad, _ = grad_fn(point, batch, rng=step.rng)
        grad = clip_norm(grad, self.clip_grad).mul_(self.gamma)
        grad.add_(local.shared["c"], alpha=1.0 - self.gamma)
        if self.weight_decay:
            grad.add_(params, alpha=self.weight_decay)
        return descend(params, grad, step.lr), local

    def local_finish(
        self, start: Tensor, params: Tensor, message: Tree, state: Tree, local: Local, ctx: Context
    ) -> tuple[Tree, Tree]:
        """The residual, positive along the descent."""
        return {"residual": (start - params).sub_(message["c"], alpha=self._public(ctx))}, state

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Put the public part back; the step per local step is the new c."""
        residual = smooth_spans(reduced["residual"], spans(self.spec), self.smoothing)
        step = torch.add(residual, server["c"], alpha=self._public(ctx))
        return params - step, {"c": step / (ctx.max_steps * ctx.lr)}

    def _public(self, ctx: Context) -> float:
        """Factor of c in the public part of a move: ``(1 - gamma) K eta``."""
        return (1.0 - self.gamma) * ctx.max_steps * ctx.lr
