"""iLLaVA, first version: the least attended tokens fold into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from vlm_accel.methods._scored import ScoredMethod, one_of
from vlm_accel.methods.base import Reduced, Tokens
from vlm_accel.ops.folding import FoldWeights, rank1

__all__ = ["Rank1"]


@dataclass(frozen=True)
class Rank1(ScoredMethod):
    """The r + 1 lowest tokens become one, weighted by rank.

    Args:
        weights: ``rank_desc`` (released code: most weight on the least attended), ``rank_asc``, ``uniform``, ``score``.

    Degenerate case: keep = N is the identity.

    Source: Hu et al. 2024, iLLaVA (arXiv 2412.06263), v1, merge rule A (iLLaVA 3.3), as in the released code of 2025.
    """

    weights: FoldWeights = "rank_desc"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("weights", self.weights, get_args(FoldWeights))

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Fold ``tokens`` to ``keep`` rows."""
        assert tokens.scores is not None
        return rank1(tokens.x, tokens.scores, keep, self.weights, tokens.sizes, tokens.trace)
