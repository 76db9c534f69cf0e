"""FedASAM: local adaptive sharpness-aware minimisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fedcore.algorithms.fedsam import FedSAM
from fedcore.ops.sam import adaptive_perturbation

__all__ = ["FedASAM"]


@dataclass(frozen=True, kw_only=True)
class FedASAM(FedSAM):
    """FedSAM whose ball is scaled by the size of each parameter.

    ``T = |theta| + a`` elementwise and ``eps = r T^2 gL / ||T gL||``; the rest is FedSAM's. ``T`` is taken
    on all trainable parameters; the authors' script takes T = 1 on those not named ``weight``. Needs a radius about ten
    times FedSAM's. ``r=0`` is FedAvg.

    Args:
        r: radius in units of the parameters' own sizes; 0.5 to 0.7 in the paper.
        a: added to the sizes (eta in the paper), so that parameters at zero move too.

    Source: Caldarola et al. 2022, arXiv 2203.11834 (without its server-side SWA: that is ``server_swa``).
    """

    r: float = 0.5
    a: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("a", 0 <= self.a < math.inf, "0 or more")

    def perturb(self, params: Tensor, grad: Tensor) -> Tensor:
        """The perturbation eps (..., P), written over the loss gradient ``grad``."""
        return adaptive_perturbation(params, grad, self.r, self.a)
