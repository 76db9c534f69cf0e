"""FedAvg: local SGD, plain average."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.algorithm import Algorithm

__all__ = ["FedAvg"]


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """Federated averaging: every client runs SGD at a constant rate, the server averages the moves.

    ``theta_t = theta_{t-1} + mean_i (theta^i_K - theta_{t-1})``. With one client it is SGD without interruption.
    Uniform weights, as in the papers compared here; ``Simulation(weighting="samples")`` weights by size.

    Source: McMahan et al. 2017, arXiv 1602.05629, Algorithm 1.
    """
