"""The least attended tokens are deleted."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_accel.methods._scored import ScoredMethod
from vlm_accel.methods.base import Reduced, Tokens
from vlm_accel.ops.folding import drop

__all__ = ["Drop"]


@dataclass(frozen=True)
class Drop(ScoredMethod):
    """Keeps the tokens of highest score, merges nothing. One decoder step with it is FastV.

    Degenerate case: keep = N is the identity.

    Source: Hu et al. 2024, iLLaVA (arXiv 2412.06263), mode 1 of the released code (iLLaVA 3.4).
    """

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Shorten ``tokens`` to ``keep`` rows."""
        assert tokens.scores is not None
        return drop(tokens.x, tokens.scores, keep, tokens.sizes, tokens.trace)
