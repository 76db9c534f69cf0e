"""FedIT: the factors of all clients averaged, each by itself."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.algorithms._lora import LoraAlgorithm

__all__ = ["FedIT"]


@dataclass(frozen=True, kw_only=True)
class FedIT(LoraAlgorithm):
    """``A = sum_k p_k A_k`` and ``B = sum_k p_k B_k``, with zeros where a client's rank is smaller.

    The product of two averages is not the average of the products: the error grows with the drift of the clients. Rows
    that no client of a round has are not averaged with nothing, they stay as they were. Sends r (d + k) numbers a layer
    each way.

    With one client it is local training.

    Source: Zhang et al. 2023, FedIT (arXiv 2305.05644); zero padding for unequal ranks as in ILoRA's comparison.
    """
