"""agg-v: Local AdamW whose second moment is averaged over clients."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.algorithms._adam import AdamFamily, Moment

__all__ = ["AggV"]


@dataclass(frozen=True, kw_only=True)
class AggV(AdamFamily):
    """AdamW on the clients; v starts a round from the elementwise mean over the clients of the last one.

    The bias correction of v counts steps over rounds, that of m within the round. ``fedadamw`` with ``alpha=0`` and
    ``v_blocks="full"``; its first round is ``local_adamw``. The authors' script of this ablation never loads the
    averaged v. Sends 2 P floats each way.

    Source: ablation of the FedAdamW paper, arXiv 2510.27486.
    """

    @property
    def carried(self) -> tuple[Moment, ...]:
        """Second moment."""
        return ("v",)
