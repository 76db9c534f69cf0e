"""FedSAM: local sharpness-aware minimisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedcore.algorithm import Algorithm, GradFn, Step, clip_norm
from fedcore.ops.sam import perturbation

__all__ = ["FedSAM"]


@dataclass(frozen=True, kw_only=True)
class FedSAM(Algorithm):
    """Clients step with the gradient at the worst point of a small ball, the server averages.

    ``eps = r gL / ||gL||`` with the loss gradient ``gL`` (no decay, one norm over all tensors), then
    ``theta <- theta - eta (gL(theta + eps) + weight_decay theta)``: decay is taken at theta. Both gradients are of the
    same batch with the same dropout draws, and running statistics move with the first only. Clipping acts on the
    gradient at ``theta + eps``. Two backward passes a step. ``r=0`` is FedAvg, at the cost of FedAvg.

    Args:
        r: radius of the ball; 0.05 as in the comparisons of FedSWA.

    Source: Qu et al. 2022, arXiv 2206.02618, Algorithm 1; Caldarola et al. 2022, arXiv 2203.11834.
    """

    r: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("r", 0 <= self.r < math.inf, "0 (no perturbation) or more")

    def gradient(self, params: Tensor, grad_fn: GradFn, batch: Any, step: Step) -> Tensor:
        """Loss gradient (..., P) at the perturbed point, clipped, plus ``weight_decay * params``."""
        if not self.r:
            return super().gradient(params, grad_fn, batch, step)
        ascent, _ = grad_fn(params, batch, rng=step.rng)
        point = self.perturb(params, ascent).add_(params)
        grad, _ = grad_fn(point, batch, rng=step.rng, update_buffers=False)
        grad = clip_norm(grad, self.clip_grad)
        return grad.add_(params, alpha=self.weight_decay) if self.weight_decay else grad

    def perturb(self, params: Tensor, grad: Tensor) -> Tensor:
        """The perturbation eps (..., P), written over the loss gradient ``grad``."""
        return perturbation(grad, self.r)
