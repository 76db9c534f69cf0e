"""FedEx-LoRA: averaged factors, and what their product misses added to the frozen weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedcore.algorithm import Context, Tree
from fedcore.algorithms._lora_layout import Part
from fedcore.algorithms._lora_merge import MergingLora

__all__ = ["FedExLoRA"]


@dataclass(frozen=True, kw_only=True)
class FedExLoRA(MergingLora):
    """A and B averaged as in FedIT; every client adds ``s (sum_k p_k B_k A_k - B A)`` to its frozen weight: exact.

    Down travel the averages and the stacked factors that the residual is made of, (r + r_tot) (d + k) numbers a layer;
    up r (d + k).

    Source: Singhal et al. 2024, FedEx-LoRA (arXiv 2410.09432); equal ranks.
    """

    equal_ranks: ClassVar[bool] = True

    def merge(self, server: Tree, params: Tensor, new: Tensor, parts: Sequence[Part], ctx: Context) -> Tree:
        """Averages of the factors; the exact average of the weights is kept beside."""
        super().merge(server, params, new, parts, ctx)
        return self.merged(server, params, parts, ctx) | self.stacked(parts)
