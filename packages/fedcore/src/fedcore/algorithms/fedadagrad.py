"""FedAdagrad: the server divides the mean move by the root of the sum of all squared moves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedcore.algorithms.fedadam import FedAdam

__all__ = ["FedAdagrad"]


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(FedAdam):
    """FedAdam with ``v <- v + D^2`` and no momentum.

    ``b2`` plays no part; ``bias_correction`` is that of the momentum alone, so nothing at ``b1=0``.

    Args:
        b1: decay of the mean; 0 in the paper.

    Source: Reddi et al. 2021, FedOpt, arXiv 2003.00295, Algorithm 2.
    """

    b1: float = 0.0

    def second_moment(self, v: Tensor, delta: Tensor) -> Tensor:
        """New second moment (P,) from the old one and the mean move (P,)."""
        return v.addcmul(delta, delta)

    def correction(self, r: int) -> float:
        """Factor on the rate in the r-th round, counted from 1: a sum has no bias, the momentum has."""
        return 1 / (1 - self.b1**r)
