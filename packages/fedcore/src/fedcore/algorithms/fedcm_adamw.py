"""FedCM-AdamW: AdamW on the clients, fed with gradients that are mixed with the last global move."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedcore.algorithm import Local, Step
from fedcore.algorithms._adam import AdamFamily

__all__ = ["FedCMAdamW"]


@dataclass(frozen=True, kw_only=True)
class FedCMAdamW(AdamFamily):
    """Local AdamW on ``beta g + (1 - beta) D``, D being the mean direction of the round before.

    Moments start every round from zero; D is zero in the first. The mixture enters both moments, after clipping.
    ``beta=1`` is ``local_adamw``. Sends 2 P floats down and P up.

    At FedCM's beta of 0.1 it runs away: a move of AdamW is about as long as the rate whatever the gradients are, so
    that D enters with nine times its weight and moves of consecutive rounds soon point the same way (digits: near
    chance at every rate).

    Source: baseline of the FedAdamW paper, arXiv 2510.27486, after FedCM: Xu et al. 2021, arXiv 2106.10874.

    Args:
        beta: share of the client's own gradient, 0 < beta <= 1 (FedCM: 0.1).
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", 0 < self.beta <= 1, "0 < beta <= 1, 1 is local_adamw")

    @property
    def directed(self) -> bool:
        """Unless ``beta`` is 1."""
        return self.beta < 1

    def adjusted(self, grad: Tensor, local: Local, step: Step) -> Tensor:
        """The mixture."""
        if not self.directed:
            return grad
        return grad.mul_(self.beta).add_(local.shared["direction"], alpha=1.0 - self.beta)
