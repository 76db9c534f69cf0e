"""FedLADA: Adam on the clients without bias corrections, steps mixed with the last global move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcore.algorithms._adam import AdamFamily, Moment

__all__ = ["FedLADA"]


@dataclass(frozen=True, kw_only=True)
class FedLADA(AdamFamily):
    """Adam with L2 on the clients; v starts a round from its mean over clients, steps are mixed with the global move.

    ``theta <- theta - eta ((1 - gamma) m / (sqrt(v) + eps) + gamma D)`` with D as in ``fedadamw``: as the authors of
    FedAdamW run it (both bias corrections off, decay in the gradient). ``gamma=0`` leaves the global move out. Sends
    3 P floats down, 2 P up.

    Source: Sun et al. 2023, arXiv 2308.00522, by the FedAdamW authors' script of November 2025.

    Args:
        gamma: weight of the last global move, 0 <= gamma < 1.
    """

    coupled: ClassVar[bool] = True

    weight_decay: float = 1e-3
    gamma: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("gamma", 0 <= self.gamma < 1, "0 <= gamma < 1, 0 leaves the last global move out")

    @property
    def carried(self) -> tuple[Moment, ...]:
        """Second moment."""
        return ("v",)

    @property
    def weights(self) -> tuple[float, float]:
        """``1 - gamma`` and ``gamma``."""
        return 1.0 - self.gamma, self.gamma

    @property
    def clocked(self) -> bool:
        """Never: there is no correction to count for."""
        return False

    def corrections(self, k: int, t: int) -> tuple[float, float]:
        """None."""
        return 1.0, 1.0
