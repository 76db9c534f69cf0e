"""FedGAMMA: SCAFFOLD on sharpness-aware gradients."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.algorithms.fedsam import FedSAM
from fedcore.algorithms.scaffold import Scaffold

__all__ = ["FedGAMMA"]


@dataclass(frozen=True, kw_only=True)
class FedGAMMA(FedSAM, Scaffold):
    """SCAFFOLD with the gradient at the worst point of a small ball in place of the plain one.

    Step along ``g_sam - c_i + c``; ``c_i`` becomes the mean of the sharpness-aware gradients met on the way, with
    decay. The perturbation itself is the client's own, uncorrected. Sends 2 P floats each way; a client keeps P.
    ``r=0`` is SCAFFOLD.

    Args:
        r: radius of the ball; FedSAM's default, since the paper's was not read.

    Source: Dai et al. 2023, FedGAMMA, IEEE TNNLS; checked against the script of one of its authors (FL-Simulator).
    """
