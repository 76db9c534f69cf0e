"""EViT: attentive tokens stay, the others fuse into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from polymodal.errors import UserError

from vlm_accel.methods.base import Reduced, ScoreKind, TokenMethod, Tokens
from vlm_accel.ops.folding import fuse
from vlm_accel.schedule import Schedule, Step

__all__ = ["EViT"]


@dataclass(frozen=True)
class EViT(TokenMethod):
    """Keeps the patches that the CLS row attends to and one fused patch: the sum of the others times their attention.

    ``keep`` counts the fused patch, so that counts are those of the schedule: keep - 1 attentive ones and one more (the
    original keeps ceil(kappa N) and appends it). The fused row stands where the best of its sources stood. The weights
    are raw attention: a fused row is no mean, and constant tokens do not stay constant.

    Args:
        kappa: share kept at each of the default steps, before blocks' MLPs 3, 6 and 9 (of 12).

    Degenerate case: keep = N is the identity.

    Source: Liang et al. 2022, EViT (arXiv 2202.07800), as in iLLaVA 5. Encoders without a CLS row rank by the attention
    received.
    """

    stages: ClassVar[tuple[str, ...]] = ("vision",)

    kappa: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.kappa <= 1:
            raise UserError(f"evit: kappa={self.kappa}; expected a share kept in (0, 1]")

    def schedule(self) -> Schedule:
        """Blocks 3, 6 and 9, ``kappa`` each."""
        return [Step("vision", layer, ratio=self.kappa) for layer in (3, 6, 9)]

    def score(self, stage: str) -> ScoreKind:
        """Attention of the CLS row."""
        return "cls"

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Shorten ``tokens`` to ``keep`` rows, one of them fused."""
        assert tokens.scores is not None
        return fuse(tokens.x, tokens.scores, keep, tokens.sizes, tokens.trace)
