"""MoFedSAM: FedSAM with the last global move as momentum."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.algorithms.fedcm import FedCM
from fedcore.algorithms.fedsam import FedSAM

__all__ = ["MoFedSAM"]


@dataclass(frozen=True, kw_only=True)
class MoFedSAM(FedSAM, FedCM):
    """FedCM whose gradient is taken at the worst point of a small ball.

    Step along ``beta g_sam + (1 - beta) Delta`` with ``g_sam = gL(theta + eps) + weight_decay theta`` as in FedSAM and
    ``Delta = (theta_{t-1} - theta_t) / (K eta)`` of the round before as in FedCM: so decay is scaled by beta too, and
    comes back through Delta. (The authors' script decays at full strength beside both.) Sends 2 P floats down and P up;
    clients keep nothing. ``r=0`` is FedCM, ``beta=1`` is FedSAM.

    Args:
        r: radius of the ball.
        beta: share of the client's own gradient, 0 < beta <= 1.

    Source: Qu et al. 2022, arXiv 2206.02618, Algorithm 1.
    """

    r: float = 0.1
    beta: float = 0.1
