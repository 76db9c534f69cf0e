"""Control: average pooling on the patch grid."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_accel.methods.base import Reduced, ScoreKind, TokenMethod, Tokens
from vlm_accel.ops.pooling import pool

__all__ = ["Pool"]


@dataclass(frozen=True)
class Pool(TokenMethod):
    """Averages neighbouring patches; k x k in ceil mode where the count is that of such a pooling.

    In a decoder without a known grid, runs of neighbours in the sequence are averaged.

    Degenerate case: keep = N is the identity.

    Source: control of iLLaVA and LightVLM (arXiv 2412.06263, 2509.00419; iLLaVA 5); other counts than those of k x k
    are met by nearly square bins, which is ours.
    """

    def score(self, stage: str) -> ScoreKind:
        """None is needed."""
        return "none"

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Average ``tokens`` into ``keep`` rows."""
        return pool(tokens.x, keep, tokens.grid, tokens.index, tokens.sizes, tokens.trace)
