"""iLLaVA, ICLR version: removed tokens flow into a few kept ones."""

from __future__ import annotations

from dataclasses import dataclass

from polymodal.errors import UserError

from vlm_accel.methods._scored import ScoredMethod
from vlm_accel.methods.base import Reduced, Tokens
from vlm_accel.ops.recycling import recycle

__all__ = ["Recycle"]


@dataclass(frozen=True)
class Recycle(ScoredMethod):
    """The lowest of the kept tokens take in the removed tokens that resemble them.

    Args:
        pc_ratio: share of the kept tokens that take in others, in [0, 1]; at least one does.
        neighbours: removed tokens that each takes in.

    Degenerate case: keep = N is the identity.

    Source: Hu et al. 2024, iLLaVA (arXiv 2412.06263), merge rule B (iLLaVA 3.4), as in the released code of 2026.
    """

    pc_ratio: float = 0.05
    neighbours: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.pc_ratio <= 1:
            raise UserError(f"recycle: pc_ratio={self.pc_ratio}; expected a share of the kept tokens in [0, 1]")
        if self.neighbours < 1:
            raise UserError(f"recycle: neighbours={self.neighbours}; expected 1 or more")

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Shorten ``tokens`` to ``keep`` rows."""
        assert tokens.scores is not None
        return recycle(
            tokens.x, tokens.scores, keep, self.pc_ratio, self.neighbours, tokens.sizes, tokens.trace
        )  # fmt: skip
