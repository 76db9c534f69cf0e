"""Multi-modal prompt learning: text prompts that are projected into the other towers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from missing_modal.methods._rows import RowPrompter, reach_of
from missing_modal.methods.base import Context, Method, Prompter

__all__ = ["MaPLe"]


@dataclass(frozen=True)
class MaPLe(Method):
    """Free text prompts P^t_j; those of another tower are P^m_j = Linear_{m,j}(P^t_j). No pattern.

    Args:
        length: L (2 in MaPLe; 36 here, as the other methods have it).
        depth: J (9 in MaPLe; 6 here).
        source: the tower whose prompts are free; empty: text, without one the last tower that has blocks.
        train_out: train what DCP trains besides prompts, so that only the prompts differ.

    Source: Khattak et al. 2023 (arXiv 2210.03117), deep coupled prompts, on the sample's own text in place of class
    names (our reading). Deviations: each coupling is drawn for itself, the first rows are drawn in place of the words
    "a photo of a", the optimizer is DCP's.
    """

    length: int = 36
    depth: int = 6
    source: str = ""
    train_out: bool = True

    def build(self, context: Context) -> Prompter:
        """Rows of the source tower, couplings to the others."""
        if self.source:
            reach_of(context, self.depth, (self.source,))
        reach = reach_of(context, self.depth)
        able = [tower.name for tower in context.towers if tower.depth]
        source = self.source or ("text" if "text" in able else able[-1])
        return _CoupledPrompter(context, self.length, reach, self.train_out, context.modalities.index(source))


class _CoupledPrompter(RowPrompter):
    """Free rows of one tower, linear images of them in the others.

    Args:
        context, length, reach, train_out: see ``RowPrompter``.
        source: index of the tower with free rows.
    """

    def __init__(self, context: Context, length: int, reach: Sequence[int], train_out: bool, source: int) -> None:
        super().__init__(context, length, reach, train_out, "maple")
        self.source = source
        width = context.towers[source].width
        # As many as the deepest tower takes: a shorter source tower itself reads the first of them only.
        self.prompts = nn.Parameter(self.draw.normal("prompts", max(self.reach), length, width))
        self.couplings = nn.ModuleList(
            nn.ModuleList(
                self.draw.linear(f"{tower.name}.{block}", width, tower.width)
                for block in range(0 if place == source else blocks)
            )
            for place, (tower, blocks) in enumerate(zip(context.towers, self.reach, strict=True))
        )

    def tables(self, masks: Sequence[int]) -> list[Tensor | None]:
        """By tower (T, J_m, L, d), the same for each of T patterns."""
        found: list[Tensor | None] = []
        for place, (blocks, layers) in enumerate(zip(self.reach, self.couplings, strict=True)):
            own: Tensor | None = self.prompts[:blocks] if blocks else None
            if own is not None and place != self.source and isinstance(layers, nn.ModuleList):
                own = torch.stack([layer(rows) for layer, rows in zip(layers, own, strict=True)])
            found.append(None if own is None else own.expand(len(masks), -1, -1, -1))
        return found
