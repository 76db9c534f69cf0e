"""Control: tokens at even distances."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_accel.methods.base import Reduced, ScoreKind, TokenMethod, Tokens
from vlm_accel.ops.folding import stride

__all__ = ["Stride"]


@dataclass(frozen=True)
class Stride(TokenMethod):
    """Keeps tokens at even distances in the sequence, whatever they hold.

    Degenerate case: keep = N is the identity.

    Source: control of iLLaVA and LightVLM (arXiv 2412.06263, 2509.00419; iLLaVA 5).
    """

    def score(self, stage: str) -> ScoreKind:
        """None is needed."""
        return "none"

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Keep rows ``i * N // keep`` of ``tokens``."""
        return stride(tokens.x, keep, tokens.sizes, tokens.trace)
