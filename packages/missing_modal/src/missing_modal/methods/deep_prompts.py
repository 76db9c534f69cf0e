"""Agnostic prompts: the same rows for every sample, whatever it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from missing_modal.methods._rows import RowPrompter, reach_of
from missing_modal.methods.base import Context, Method, Prompter

__all__ = ["AgnosticPrompter", "DeepPrompts"]


@dataclass(frozen=True)
class DeepPrompts(Method):
    """VPT-deep in every tower: P^m_j (L x d_m) in front of block j < J, replaced at each block.

    Args:
        length: L.
        depth: J; 1: first block only (shallow).
        towers: names of the towers that get prompts, joined by ``+``; empty: all with blocks.
        train_out: train what DCP trains besides prompts, so that only the prompts differ.

    Source: Jia et al. 2022 (arXiv 2203.12119), VPT-deep, in both encoders as DCP's comparisons need it (our reading).
    Deviation: N(0, 0.02^2) in place of Xavier-uniform, rows in front of the CLS, as DCP has them.
    """

    length: int = 36
    depth: int = 6
    towers: str = ""
    train_out: bool = True

    def build(self, context: Context) -> Prompter:
        """One set of rows per tower and block."""
        reach = reach_of(context, self.depth, self.towers.split("+") if self.towers else ())
        return AgnosticPrompter(context, self.length, reach, self.train_out, "deep_prompts")


class AgnosticPrompter(RowPrompter):
    """Rows by tower and block; arguments of ``RowPrompter``."""

    def __init__(self, context: Context, length: int, reach: Sequence[int], train_out: bool, method: str) -> None:
        super().__init__(context, length, reach, train_out, method)
        #: by tower (J_m, L, d), None without prompts
        self.prompts = nn.ParameterList(
            nn.Parameter(self.draw.normal(tower.name, blocks, length, tower.width)) if blocks else None
            for tower, blocks in zip(context.towers, self.reach, strict=True)
        )

    def tables(self, masks: Sequence[int]) -> list[Tensor | None]:
        """The same (J_m, L, d) for each of T patterns, as a view."""
        return [None if value is None else value.expand(len(masks), -1, -1, -1) for value in self.prompts]
