"""Local Muon: orthogonalised local steps, plain average."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.algorithms.fedmuon import FedMuon

__all__ = ["LocalMuon"]


@dataclass(frozen=True, kw_only=True)
class LocalMuon(FedMuon):
    """FedMuon with both switches off: momentum starts at zero in every round, nothing is aligned, only models travel.

    With ``aggregate_momentum`` and ``align`` on and beta 0.98 it is FedMuon again. The authors ran it at beta 0.95, so
    a fair comparison reports it at both. One client that is never interrupted differs from Muon by the restarts.

    Source: baseline of Liu et al. 2025, arXiv 2510.27403; Muon: K. Jordan 2024.
    """

    gamma: float = 0.0
    beta: float = 0.95
    aggregate_momentum: bool = False
    align: bool = False
