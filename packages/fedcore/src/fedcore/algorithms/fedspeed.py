"""FedSpeed: proximal steps whose bias a dual variable takes out, on partly perturbed gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from polymodal.errors import UserError
from torch import Tensor

from fedcore.algorithm import Algorithm, Client, Context, GradFn, Local, Step, Tree, clip_norm
from fedcore.algorithms.fedsam import FedSAM
from fedcore.ops.schedule import descend

__all__ = ["FedSpeed"]

DualMean = Literal["cohort", "all"]


@dataclass(frozen=True, kw_only=True)
class FedSpeed(FedSAM):
    """Prox-correction and a gradient merged with that of an ascent step.

    Local step with ``eps = r g1 / ||g1||``, ``g1 = gL(theta)``, ``g2 = gL(theta + eps)``:

        theta <- theta - eta ((1 - alpha) g1 + alpha g2 + weight_decay theta - h_i + (theta - theta_{t-1}) / lam)

    Then ``h_i <- h_i - (theta^i_K - theta_{t-1}) / lam`` (zero before the client's first round) and the server averages
    the amended models ``theta^i_K - lam h_i``: ``theta^i_K`` over the cohort and, as the authors' script does,
    ``lam h_i`` over all clients, present or not. ``dual_mean="cohort"`` averages both over the cohort, as the paper
    prints it. The two are the same where everyone takes part; with few clients a round the printed average adds the
    earlier moves of those present once more and falls far behind FedAvg (16 points with a tenth of the clients). The
    merged gradient is clipped, not its corrections (the script clips the sum). P floats each way; a client keeps P.

    ``r=0`` (or ``alpha=0``) is FedDyn with ``a = 1/lam``.

    Args:
        r: length of the ascent step (rho in the paper); 0.1 as in the authors' script.
        alpha: weight of the gradient after the ascent, 0..1; the script has 1.
        lam: inverse weight of the proximal term; 10 as in the script (whose ``lamb`` is 1/lam).
        dual_mean: whose dual variables the server averages.

    Source: Sun et al. 2023, arXiv 2302.10429; our reading, from the authors' script (FL-Simulator) and two
    reimplementations.
    """

    keeps_state: ClassVar[bool] = True

    r: float = 0.1
    alpha: float = 1.0
    lam: float = 10.0
    dual_mean: DualMean = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("alpha", 0 <= self.alpha <= 1, "0 <= alpha <= 1, 0 leaves the ascent out")
        self.check("lam", 0 < self.lam < math.inf, "more than 0; large values weaken the proximal term")
        if self.dual_mean not in get_args(DualMean):
            raise UserError(f"dual_mean={self.dual_mean!r}; expected {' or '.join(get_args(DualMean))}")

    def gradient(self, params: Tensor, grad_fn: GradFn, batch: Any, step: Step) -> Tensor:
        """Merged loss gradient (..., P), clipped, plus ``weight_decay * params``."""
        if not self.r or not self.alpha:
            return Algorithm.gradient(self, params, grad_fn, batch, step)
        if self.alpha == 1:
            return super().gradient(params, grad_fn, batch, step)
        plain, _ = grad_fn(params, batch, rng=step.rng)
        point = self.perturb(params, plain.clone()).add_(params)
        ahead, _ = grad_fn(point, batch, rng=step.rng, update_buffers=False)
        grad = clip_norm(plain.lerp_(ahead, self.alpha), self.clip_grad)
        return grad.add_(params, alpha=self.weight_decay) if self.weight_decay else grad

    def server_init(self, params: Tensor) -> Tree:
        """``h`` (P,), the mean of all clients' dual variables, where the server needs it."""
        return {"h": torch.zeros_like(params)} if self.dual_mean == "all" else {}

    def client_init(self, ctx: Context, client: Client) -> Tree:
        """``h`` (P,), zero."""
        return {"h": torch.zeros(self.spec.numel, dtype=self.spec.dtype)}

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Local]:
        """``h_i + theta_{t-1} / lam``, the constant part of both corrections."""
        return params, Local(own={"pull": torch.add(state["h"], params, alpha=1 / self.lam)})

    def local_step(self, params: Tensor, grad_fn: GradFn, batch: Any, local: Local, step: Step) -> tuple[Tensor, Local]:
        """SGD along the merged gradient with both corrections."""
        grad = self.gradient(params, grad_fn, batch, step)
        grad.add_(params, alpha=1 / self.lam).sub_(local.own["pull"])
        return descend(params, grad, step.lr), local

    def local_finish(
        self, start: Tensor, params: Tensor, message: Tree, state: Tree, local: Local, ctx: Context
    ) -> tuple[Tree, Tree]:
        """Move (of the amended model, if duals are averaged over the cohort) and the new dual variable."""
        delta = params - start
        dual = torch.sub(state["h"], delta, alpha=1 / self.lam)
        amended = torch.sub(delta, dual, alpha=self.lam) if self.dual_mean == "cohort" else delta
        return {"delta": amended}, {"h": dual}

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Average of the amended models."""
        if self.dual_mean == "cohort":
            return params + reduced["delta"], server
        share = ctx.cohort / ctx.num_clients
        dual = torch.sub(server["h"], reduced["delta"], alpha=share / self.lam)
        return (params + reduced["delta"]).sub_(dual, alpha=self.lam), {"h": dual}
