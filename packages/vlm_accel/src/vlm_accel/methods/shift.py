"""iLLaVA's baseline: the last token folds into its neighbour, again and again."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_accel.methods.base import Reduced, ScoreKind, TokenMethod, Tokens
from vlm_accel.ops.folding import shift

__all__ = ["Shift"]


@dataclass(frozen=True)
class Shift(TokenMethod):
    """Averages the last token into the one before it until ``keep`` are left; looks at no score.

    Degenerate case: keep = N is the identity.

    Source: Hu et al. 2024, iLLaVA (arXiv 2412.06263), mode 2 of the released code (iLLaVA 3.4).
    """

    def score(self, stage: str) -> ScoreKind:
        """None is needed."""
        return "none"

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Shorten ``tokens`` to ``keep`` rows."""
        return shift(tokens.x, keep, tokens.sizes, tokens.trace)
