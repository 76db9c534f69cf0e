"""FedYogi: FedAdam whose second moment moves by steps of bounded size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedcore.algorithms.fedadam import FedAdam

__all__ = ["FedYogi"]


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdam):
    """FedAdam with ``v <- v - (1-b2) D^2 sign(v - D^2)``.

    Where the moves become small, v falls by no more than their square, so the rate does not jump up. With ``v0=0`` the
    first round is FedAdam's. Flower never corrects the bias here; ``bias_correction`` does it as in FedAdam.

    Source: Reddi et al. 2021, FedOpt, arXiv 2003.00295, Algorithm 2.
    """

    def second_moment(self, v: Tensor, delta: Tensor) -> Tensor:
        """New second moment (P,) from the old one and the mean move (P,)."""
        square = delta.square()
        return v - (v - square).sign_().mul_(square).mul_(1 - self.b2)
