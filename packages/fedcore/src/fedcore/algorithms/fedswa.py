"""FedSWA: a local rate that decays in every round, and a server that steps beyond the average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcore.algorithm import Algorithm, Context, GradFn, Local, Step, Tree
from fedcore.ops.schedule import descend, local_rate

__all__ = ["FedSWA"]


@dataclass(frozen=True, kw_only=True)
class FedSWA(Algorithm):
    """Stochastic weight averaging inside each round.

    Clients run SGD with ``eta_k = eta (1 - (k/K) (1 - rho))``, restarted in every round; the server moves to
    ``theta + alpha (mean_i theta^i_K - theta)``, beyond the average where alpha > 1. The model after that step is what
    is evaluated and sent.

    ``rho=1, alpha=1`` is FedAvg, bit for bit. Not the FedSWA of Caldarola et al. 2022, which averages the late models
    of the server: that is ``server_swa``. The authors' script of 2026 has neither rho nor alpha; this is the paper's.

    Source: Liu et al. 2025, arXiv 2507.20016.

    Args:
        rho: local rate at the end of a round over that at its start, 0..1 (paper: 0.1).
        alpha: step of the server along the mean move (paper: 1.5).
    """

    rho: float = 0.1
    alpha: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("rho", 0 <= self.rho <= 1, "0 <= rho <= 1, 1 keeps the rate within a round")
        self.check("alpha", self.alpha > 0, "more than 0, 1 is the plain average")

    def local_step(self, params: Tensor, grad_fn: GradFn, batch: Any, local: Local, step: Step) -> tuple[Tensor, Local]:
        """SGD at the rate of the step."""
        grad = self.gradient(params, grad_fn, batch, step)
        return descend(params, grad, local_rate(step.lr, step.k, step.K, self.rho)), local

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Step of length ``alpha`` along the mean move."""
        return torch.add(params, reduced["delta"], alpha=self.alpha), server
