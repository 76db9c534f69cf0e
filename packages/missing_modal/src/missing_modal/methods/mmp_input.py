"""Missing-aware prompts, input level, on two-tower models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from polymodal.errors import UserError
from torch import Tensor, nn

from missing_modal.methods._rows import RowPrompter, reach_of
from missing_modal.methods.base import Context, Method, Prompter
from missing_modal.prompts import PatternParameter

__all__ = ["MMPInput", "PatternPrompter"]


@dataclass(frozen=True)
class MMPInput(Method):
    """Prompts P^m_{t,j} of their own for each pattern t, tower m and block j < J, as rows.

    Args:
        length: L.
        depth: J.
        insertion: ``replace``: block j's rows take the place of those of block j - 1, as in DCP. ``accumulate``: they
            come in front of them, J L rows at the end, as in MMP on ViLT.
        pattern_params: auto, table, additive (more than two modalities).
        train_out: train what DCP trains besides prompts, so that only the prompts differ.

    Source: Lee et al. 2023 (arXiv 2303.03369), input level. On CLIP's two towers it is our reading, as in DCP's
    comparisons; it replaces by default so that all methods have the same number of rows. Deviation: N(0, 0.02^2) in
    place of zeros with one row of ones.
    """

    length: int = 36
    depth: int = 6
    insertion: str = "replace"
    pattern_params: str = "auto"
    train_out: bool = True

    def build(self, context: Context) -> Prompter:
        """One set of rows per pattern, tower and block."""
        if self.insertion not in ("replace", "accumulate"):
            raise UserError(f"insertion={self.insertion!r}; expected replace or accumulate")
        reach = reach_of(context, self.depth)
        stack = self.insertion == "accumulate"
        return PatternPrompter(context, self.length, reach, self.train_out, "mmp_input", self.pattern_params, stack)


class PatternPrompter(RowPrompter):
    """Rows by pattern, tower and block.

    Args:
        context, length, reach, train_out, method: see ``RowPrompter``.
        kind: of the pattern's parameters.
        accumulate: new rows come in front of the old ones.
    """

    def __init__(
        self,
        context: Context,
        length: int,
        reach: Sequence[int],
        train_out: bool,
        method: str,
        kind: str,
        accumulate: bool = False,
    ) -> None:
        super().__init__(context, length, reach, train_out, method)
        self.accumulate = accumulate
        self.prompts = nn.ModuleList(
            PatternParameter(self.draw, tower.name, context.modalities, (blocks, length, tower.width), kind)
            if blocks
            else nn.Identity()
            for tower, blocks in zip(context.towers, self.reach, strict=True)
        )

    def tables(self, masks: Sequence[int]) -> list[Tensor | None]:
        """By tower (T, J_m, L, d)."""
        return [value(masks) if isinstance(value, PatternParameter) else None for value in self.prompts]

    def rows(self, tower: int) -> int:
        """L, or J_m L where rows accumulate."""
        return self.length * (self.reach[tower] if self.accumulate else bool(self.reach[tower]))

    def before(self, tower: int, block: int, h: Tensor, which: Tensor, tables: Any) -> Tensor:
        """Rows replaced, or further ones put in front."""
        table = tables[tower]
        if not self.accumulate or table is None or block >= table.shape[1]:
            return super().before(tower, block, h, which, tables)
        return torch.cat([table[:, block].index_select(0, which).to(h.dtype), h], dim=1)
