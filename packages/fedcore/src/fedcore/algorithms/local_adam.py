"""Local Adam: Adam with L2 regularisation on the clients, plain average of the models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcore.algorithms._adam import AdamFamily

__all__ = ["LocalAdam"]


@dataclass(frozen=True, kw_only=True)
class LocalAdam(AdamFamily):
    """``local_adamw`` with ``weight_decay * theta`` added to the clipped gradient instead of decoupled decay.

    ``weight_decay=0`` is ``local_adamw`` without decay. Sends P floats each way.

    Source: baseline of the FedAdamW paper, arXiv 2510.27486; Adam: Kingma and Ba 2015, arXiv 1412.6980.
    """

    coupled: ClassVar[bool] = True
