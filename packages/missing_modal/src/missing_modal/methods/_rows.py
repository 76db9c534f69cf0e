"""What methods share that put learned rows in front of the tokens: gathering by pattern, replacing at each block."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from polymodal.errors import UserError
from torch import Tensor

from missing_modal.draws import Draws
from missing_modal.methods.base import Context, Prompter

__all__ = ["RowPrompter", "reach_of"]


def reach_of(context: Context, depth: int, only: Sequence[str] = ()) -> list[int]:
    """Blocks of each tower that get prompts: min(depth, blocks), 0 for towers that are not in ``only``.

    Raises:
        UserError: a depth below one; with two modalities also one above a tower's number of blocks (DCP 3.6); an
            unknown modality, or one without blocks.
    """
    for name in only:
        if name not in context.modalities:
            raise UserError(f"prompts for {name!r}; the towers are {', '.join(context.modalities)}")
    if depth < 1:
        raise UserError(f"prompt depth {depth}; expected 1 (first block only) or more")
    chosen = [tower for tower in context.towers if not only or tower.name in only]
    for tower in chosen:
        if 0 < tower.depth < depth and len(context.towers) <= 2:
            raise UserError(f"prompt depth {depth}, but the {tower.name} tower has {tower.depth} blocks; lower depth")
    if not any(tower.depth for tower in chosen):
        names = ", ".join(tower.name for tower in chosen)
        raise UserError(f"no tower of {names} has blocks that take prompts; choose head_only")
    return [min(depth, tower.depth) if tower in chosen else 0 for tower in context.towers]


class RowPrompter(Prompter):
    """L learned rows in front of the tokens of each tower, replaced in front of each of the first blocks.

    Subclasses give ``tables``: by tower (T, J_m, L, d) for T patterns, or None.

    Args:
        context: of the build.
        length: L; 0 puts nothing in.
        reach: J_m by tower (``reach_of``).
        train_out: see ``Prompter``.
        method: name, for the initial values.
    """

    def __init__(self, context: Context, length: int, reach: Sequence[int], train_out: bool, method: str) -> None:
        super().__init__(context, train_out)
        if length < 0:
            raise UserError(f"prompt length {length}; expected 0 (no prompts) or more")
        self.length = length
        self.reach = [blocks if length else 0 for blocks in reach]
        self.draw = Draws(context.seed, method)

    @abstractmethod
    def tables(self, masks: Sequence[int]) -> list[Tensor | None]:
        """By tower (T, J_m, L, d), or None."""

    def rows(self, tower: int) -> int:
        """L where the tower has prompts."""
        return self.length if self.reach[tower] else 0

    def enter(self, tower: int, tokens: Tensor, which: Tensor, tables: Any) -> Tensor | None:
        """(b, L, d) of block 0."""
        table = tables[tower]
        return None if table is None else table[:, 0].index_select(0, which).to(tokens.dtype)

    def before(self, tower: int, block: int, h: Tensor, which: Tensor, tables: Any) -> Tensor:
        """The first L rows replaced while block < J_m."""
        table = tables[tower]
        if table is None or block >= table.shape[1]:
            return h
        return torch.cat([table[:, block].index_select(0, which).to(h.dtype), h[:, self.length :]], dim=1)
