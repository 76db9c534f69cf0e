"""DP-FedSAM: sharpness-aware local steps under client-level differential privacy."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.algorithms._private import SparseUpload
from fedcore.algorithms.fedsam import FedSAM

__all__ = ["DPFedSAM"]


@dataclass(frozen=True, kw_only=True)
class DPFedSAM(FedSAM, SparseUpload):
    """Local steps as in FedSAM, the move clipped and averaged with noise as in DP-FedAvg.

    Flat minima lose less by the noise. ``topk`` below 1 is DP-FedSAM-topk: small entries of a move are set to zero
    before it is clipped, so that the clip costs the large ones less; noise is on all coordinates. (The authors add
    their share of noise on each client; here it is added once, to the sum, with the same distribution.) ``r=0,
    topk=1`` is DP-FedAvg. Two backward passes a step. The noise and the mask's place are our reading.

    Source: Shi et al. 2023, arXiv 2303.11242, Algorithm 1.

    Args:
        r: radius of the ball.
        topk: share of each tensor's entries that is kept, 0 < topk <= 1.
    """
