"""Missing-aware prompts as published: on ViLT, one encoder for text and image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from polymodal.errors import UserError
from torch import Tensor, nn

from missing_modal.methods.base import Context, Method, Prompter

__all__ = ["MMPVilt", "ViltPrompts"]

# The row of ones by pattern: complete 0, image missing 1, text missing 2.
_MARK = {0b11: 0, 0b10: 1, 0b01: 2}


@dataclass(frozen=True)
class MMPVilt(Method):
    """Prompts of their own for each pattern and block, on ViLT (towers of ``vilt:FOLDER``).

    Args:
        length: L, rows a block; at the attention level the first half are keys, the second half values.
        depth: J, blocks with prompts.
        level: ``input``: rows in front of the sequence, which accumulate: block i sees (i + 1) L of them.
            ``attention``: keys and values, after their projections.

    Trained besides: ViLT's pooler, the head. Initial values: zeros with one row of ones, whose place says the pattern.

    Source: Lee et al. 2023 (arXiv 2303.03369), released code (DCP 5).
    """

    length: int = 16
    depth: int = 6
    level: str = "input"

    #: one encoder over all modalities: built by ``fused.FusedClassifier``
    fused: ClassVar[bool] = True

    def build(self, context: Context) -> Prompter:
        """Prompts for three patterns."""
        if context.modalities != ("image", "text"):
            raise UserError("mmp_vilt is for image and text; choose mmp_input for other modalities")
        if self.level not in ("input", "attention"):
            raise UserError(f"level={self.level!r}; expected input or attention")
        least = 6 if self.level == "attention" else 3
        if self.length < least or (self.level == "attention" and self.length % 2):
            raise UserError(f"prompt length {self.length}; expected {least} or more, even at the attention level")
        if not 1 <= self.depth <= context.towers[0].depth:
            raise UserError(f"prompt depth {self.depth}; expected 1 to {context.towers[0].depth}, the number of blocks")
        return ViltPrompts(context, self.length, self.depth, self.level == "attention")


class ViltPrompts(Prompter):
    """Rows, or keys and values, by pattern and block; tower 0 stands for the one encoder.

    Args:
        context: two specs of the same encoder.
        length: L.
        depth: J.
        attention: keys and values in place of rows.
    """

    def __init__(self, context: Context, length: int, depth: int, attention: bool) -> None:
        super().__init__(context, train_out=False)
        self.depth, self.attention = depth, attention
        #: (patterns, J, L, d), complete, text missing, image missing (the order of ``context.masks``)
        self.value = nn.Parameter(torch.zeros(len(context.masks), depth, length, context.towers[0].width))
        with torch.no_grad():
            for place, mask in enumerate(context.masks):
                self.value[place, :, _MARK[mask]] = 1
                if attention:
                    self.value[place, :, length // 2 + _MARK[mask]] = 1

    def rows(self, tower: int) -> int:
        """J L at the input level, else none."""
        return 0 if self.attention else self.depth * self.value.shape[2]

    def tables(self, masks: Sequence[int]) -> Tensor:
        """(T, J, L, d)."""
        return self.value[[self.context.masks.index(mask) for mask in masks]]

    def enter(self, tower: int, tokens: Tensor, which: Tensor, tables: Any) -> Tensor | None:
        """Rows of block 0."""
        return None if self.attention else tables[:, 0].index_select(0, which).to(tokens.dtype)

    def before(self, tower: int, block: int, h: Tensor, which: Tensor, tables: Any) -> Tensor:
        """Further rows in front of those that are there."""
        if self.attention or block >= self.depth:
            return h
        return torch.cat([tables[:, block].index_select(0, which).to(h.dtype), h], dim=1)

    def extra(self, tower: int, block: int, which: Tensor, tables: Any) -> tuple[Tensor, Tensor] | None:
        """(b, L / 2, d) keys and values."""
        if not self.attention or block >= self.depth:
            return None
        keys, values = tables[:, block].index_select(0, which).chunk(2, dim=1)
        return keys, values
