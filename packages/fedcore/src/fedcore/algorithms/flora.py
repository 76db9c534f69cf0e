"""FLoRA: the stacked factors of all clients are merged into the frozen weight, and adapters begin anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from polymodal.seeding import generator
from torch import Tensor

from fedcore.algorithm import Context, Tree
from fedcore.algorithms._lora_layout import Layout, Part
from fedcore.algorithms._lora_merge import MergingLora
from fedcore.lora.init import kaiming_init

__all__ = ["FLoRA"]


@dataclass(frozen=True, kw_only=True)
class FLoRA(MergingLora):
    """``W <- W + sum_k p_k s_k B_k A_k`` by stacking, exact at any ranks; clients restart from fresh factors.

    Where factors do not start from B = 0 (QR), what is merged is their change. Fresh factors follow from the round's
    number, so only the stacks travel down, r_tot (d + k) numbers a layer, and r (d + k) up.

    Source: Wang et al. 2024, FLoRA (arXiv 2409.05976).

    Args:
        restart: fresh factors are ``random`` (A drawn anew by Kaiming's rule each round, B = 0), or those of the
            ``start``.
        seed: of the draws.
    """

    unsent: ClassVar[str] = "ab"

    restart: Literal["random", "start"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("restart", self.restart in ("random", "start"), "random or start")

    def home(self, round: int) -> Tensor:
        """Fresh factors of a round."""
        return self._fresh(self.own, super().home(round), round)

    def sent(self, params: Tensor, rank: int, round: int) -> Tensor:
        """Fresh factors with the averaged head."""
        layout = self.layouts[rank]
        vector = self._fresh(layout, self.spec.starts[rank], round).clone()
        if round:
            for mine, its in zip(self.own.whole, layout.whole, strict=True):
                its.view(vector).copy_(mine.view(params))
        return vector

    def merge(self, server: Tree, params: Tensor, new: Tensor, parts: Sequence[Part], ctx: Context) -> Tree:
        """Merge all changes; the factors are those of the next round."""
        fresh = self._fresh(self.own, self.spec.starts[max(self.layouts)], ctx.round + 1)
        for layer in self.own.layers:
            for target, value in zip(layer.factors(new), layer.factors(fresh), strict=True):
                target.copy_(value)
        return self.merged(server, params, parts, ctx) | self.stacked(parts)

    def _fresh(self, layout: Layout, start: Tensor, round: int) -> Tensor:
        """(P_rank,) with the factors of a round; a smaller rank has the first rows of a larger one."""
        if round == 0 or self.restart == "start":
            return start
        vector = start.clone()
        for i, layer in enumerate(layout.layers):
            draw = generator(self.seed, "flora", round, i)
            a, b = kaiming_init(layer.rank, layer.a.shape[1], layer.b.shape[0], draw)
            for target, value in zip(layer.factors(vector), (a, b), strict=True):
                target.copy_(value)
        return vector
