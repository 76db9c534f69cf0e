"""agg-vm: Local AdamW whose two moments are averaged over clients."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.algorithms._adam import AdamFamily, Moment

__all__ = ["AggVM"]


@dataclass(frozen=True, kw_only=True)
class AggVM(AdamFamily):
    """AdamW on the clients; m and v start a round from their elementwise means over the clients of the last one.

    Both bias corrections count steps over rounds. With one client it is AdamW without interruption; its first round is
    ``local_adamw``. Sends 3 P floats each way.

    Source: ablation of the FedAdamW paper, arXiv 2510.27486.
    """

    @property
    def carried(self) -> tuple[Moment, ...]:
        """Both moments."""
        return ("m", "v")
