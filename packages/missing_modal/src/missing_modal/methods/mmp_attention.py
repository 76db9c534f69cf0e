"""Missing-aware prompts, attention level, on two-tower models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polymodal.errors import UserError
from torch import Tensor

from missing_modal.methods._rows import reach_of
from missing_modal.methods.base import Context, Method, Prompter
from missing_modal.methods.mmp_input import PatternPrompter

__all__ = ["MMPAttention"]


@dataclass(frozen=True)
class MMPAttention(Method):
    """Prompts of their own for each pattern, tower and block: the first half keys, the second half values.

    Args:
        length: L, even: L / 2 keys and as many values a block.
        depth: J.
        pattern_params: auto, table, additive (more than two modalities).
        train_out: train what DCP trains besides prompts, so that only the prompts differ.

    Source: Lee et al. 2023 (arXiv 2303.03369), attention level: concatenated after the key and value projections,
    before the heads are split, queries unchanged. On CLIP's towers it is our reading. Deviation: N(0, 0.02^2) in place
    of zeros with rows of ones; in causal towers every row sees them.
    """

    length: int = 36
    depth: int = 6
    pattern_params: str = "auto"
    train_out: bool = True

    def build(self, context: Context) -> Prompter:
        """One set of keys and values per pattern, tower and block."""
        if self.length % 2:
            raise UserError(f"prompt length {self.length}; expected an even number: half keys, half values")
        reach = reach_of(context, self.depth)
        return _KeysPrompter(context, self.length, reach, self.train_out, "mmp_attention", self.pattern_params)


class _KeysPrompter(PatternPrompter):
    """The tables of ``PatternPrompter`` as keys and values; no rows."""

    def rows(self, tower: int) -> int:
        """None in front of the tokens."""
        return 0

    def enter(self, tower: int, tokens: Tensor, which: Tensor, tables: Any) -> Tensor | None:
        """Nothing."""
        return None

    def before(self, tower: int, block: int, h: Tensor, which: Tensor, tables: Any) -> Tensor:
        """Unchanged."""
        return h

    def extra(self, tower: int, block: int, which: Tensor, tables: Any) -> tuple[Tensor, Tensor] | None:
        """(b, L / 2, d) keys and values of the first J_m blocks."""
        table = tables[tower]
        if table is None or block >= table.shape[1]:
            return None
        keys, values = table[:, block].index_select(0, which).chunk(2, dim=1)
        return keys, values
