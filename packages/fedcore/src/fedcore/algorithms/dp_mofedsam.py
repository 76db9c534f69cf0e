"""DP-MoFedSAM: DP-FedCM on sharpness-aware gradients."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.algorithms.dp_fedcm import DPFedCM
from fedcore.algorithms.fedsam import FedSAM

__all__ = ["DPMoFedSAM"]


@dataclass(frozen=True, kw_only=True)
class DPMoFedSAM(FedSAM, DPFedCM):
    """MoFedSAM whose momentum comes from released moves; the whole move is clipped.

    ``r=0`` is DP-FedCM, ``beta=1`` is DP-FedSAM. Without noise and clipping it is MoFedSAM. How it is made private is
    our reading.

    Source: Qu et al. 2022, arXiv 2206.02618, Algorithm 1.

    Args:
        r: radius of the ball.
        beta: share of the client's own gradient, 0 < beta <= 1.
    """

    r: float = 0.1
    beta: float = 0.1
