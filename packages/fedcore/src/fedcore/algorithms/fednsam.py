"""FedNSAM: sharpness-aware steps from where the server's momentum would lead."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.algorithms.fedacg import FedACG
from fedcore.algorithms.fedsam import FedSAM

__all__ = ["FedNSAM"]


@dataclass(frozen=True, kw_only=True)
class FedNSAM(FedSAM, FedACG):
    """FedACG's look-ahead start and server momentum, FedSAM's local steps, no proximal term.

    Clients start at ``look = theta + lam m`` and run FedSAM; ``m <- lam m + mean_i (theta^i_K - look)``,
    ``theta <- theta + m``. P floats each way; clients keep nothing. ``r=0`` is FedACG without its proximal term,
    ``lam=0`` is FedSAM.

    Args:
        r: radius of the ball.
        lam: momentum of the server, 0 <= lam < 1.
        b: weight of FedACG's proximal term; none here.

    Source: Liu et al. 2026, arXiv 2602.23827, in our reading: perturbations from the client's own gradient, as in
    the comparisons of FedSWA, where the abstract speaks of perturbing along the global momentum.
    """

    b: float = 0.0
