"""ToMe: the most similar pairs merge, and attention counts what a token stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlm_accel.methods.base import Reduced, ScoreKind, TokenMethod, Tokens
from vlm_accel.ops.bipartite import tome

__all__ = ["ToMe"]


@dataclass(frozen=True)
class ToMe(TokenMethod):
    """Bipartite matching of even and odd patches by their keys; means by size; log sizes on the attention logits.

    The original changes the order of tokens to [unmerged even, odd]. Here every row stands at its own ascending
    position (``kept``), which is the same to an encoder without relative positions. A step that asks for more than the
    half which one matching can merge repeats the matching.

    Args:
        proportional: later blocks add log(size) to the logits of each key (the paper's proportional attention).

    Degenerate case: keep = N is the identity.

    Source: Bolya et al. 2022, ToMe (arXiv 2210.09461), as in iLLaVA 5; the official code is not ours to copy.
    """

    stages: ClassVar[tuple[str, ...]] = ("vision",)
    needs_keys: ClassVar[bool] = True
    biases_keys: ClassVar[bool] = True

    proportional: bool = True

    def score(self, stage: str) -> ScoreKind:
        """None is needed."""
        return "none"

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Merge ``tokens`` to ``keep`` rows."""
        assert tokens.keys is not None
        reduced = tome(tokens.x, tokens.keys, keep, tokens.sizes, tokens.prefix, tokens.trace)
        if not self.proportional:
            reduced.key_bias = None
        return reduced
