"""Control: a seeded random choice of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_accel.methods.base import Reduced, ScoreKind, TokenMethod, Tokens
from vlm_accel.ops.folding import drop
from vlm_accel.ops.random import uniform

__all__ = ["Random"]


@dataclass(frozen=True)
class Random(TokenMethod):
    """Keeps tokens at random: what any score must beat.

    The draw is a function of (seed, stage, layer, image), so that a run can be repeated and a batch equals its samples.

    Degenerate case: keep = N is the identity.

    Source: control of iLLaVA and LightVLM (arXiv 2412.06263, 2509.00419; iLLaVA 5).
    """

    def score(self, stage: str) -> ScoreKind:
        """None is needed."""
        return "none"

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Keep ``keep`` random rows of ``tokens``."""
        s, n = tokens.x.shape[:2]
        draws = uniform(tokens.seed, tokens.stage, tokens.layer, tokens.span, s, n, tokens.x.device)
        return drop(tokens.x, draws, keep, tokens.sizes, tokens.trace)
