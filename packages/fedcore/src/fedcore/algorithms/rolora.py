"""RoLoRA: one factor trains while the other stands still, in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcore.algorithms._lora import LoraAlgorithm

__all__ = ["RoLoRA"]


@dataclass(frozen=True, kw_only=True)
class RoLoRA(LoraAlgorithm):
    """B is trained and averaged in the first round and every second one after it, A in the others; the head in all.

    The factor that stands still is the same for all clients, so the average of the products is exact. B goes first:
    with the usual start B = 0, A has no gradient before. Up travels the factor that was trained; down both, since a
    client may have been away.

    Source: Chen et al. 2025, RoLoRA (arXiv 2502.01755); equal ranks.
    """

    equal_ranks: ClassVar[bool] = True

    def still(self, round: int) -> str:
        """A in rounds 0, 2, …; B in rounds 1, 3, …."""
        return "b" if round % 2 else "a"
