"""Local AdamW: AdamW on the clients, plain average of the models."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.algorithms._adam import AdamFamily

__all__ = ["LocalAdamW"]


@dataclass(frozen=True, kw_only=True)
class LocalAdamW(AdamFamily):
    """Every client runs AdamW from zero moments; the server averages the moves and nothing else.

    With one client and one step a round, it is AdamW that forgets its moments after every step. Sends P floats each
    way.

    Source: baseline of the FedAdamW paper, arXiv 2510.27486; AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101.
    """
