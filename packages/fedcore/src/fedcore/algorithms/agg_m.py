"""agg-m: Local AdamW whose first moment is averaged over clients, with a cap on its step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedcore.algorithm import Local
from fedcore.algorithms._adam import AdamFamily, Moment
from fedcore.ops.adam import capped_adam_step_

__all__ = ["AggM"]


@dataclass(frozen=True, kw_only=True)
class AggM(AdamFamily):
    """AdamW on the clients; m starts a round from its elementwise mean over the clients of the last one, v from zero.

    A carried m over a fresh v is unbounded where the new gradient is small, so every coordinate of Adam's step is held
    within ``cap`` (the authors' ablation has no cap, and their script never loads the averaged m). The bias correction
    of m counts steps over rounds, that of v within the round. Sends 2 P floats each way.

    Source: ablation of the FedAdamW paper, arXiv 2510.27486; the cap is part of our reading.

    Args:
        cap: largest absolute value of a coordinate of Adam's step, more than 0.
    """

    cap: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("cap", self.cap > 0, "more than 0")

    @property
    def carried(self) -> tuple[Moment, ...]:
        """First moment."""
        return ("m",)

    def advance(self, params: Tensor, grad: Tensor, local: Local, **options: float) -> None:
        """Adam's step in place, coordinates held within the cap."""
        m, v = local.own["m"], local.own["v"]
        capped_adam_step_(params, grad, m, v, b2=self.b2, eps=self.eps, cap=self.cap, **options)
