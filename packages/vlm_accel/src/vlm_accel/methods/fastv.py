"""FastV: one step after the first layers, the least attended image tokens go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polymodal.errors import UserError

from vlm_accel.methods._features import check_ratio
from vlm_accel.methods.base import Reduced, TokenMethod, Tokens
from vlm_accel.ops import drop
from vlm_accel.schedule import Schedule, Step

if TYPE_CHECKING:
    from vlm_accel.methods.base import ScoreKind

__all__ = ["FastV"]


@dataclass(frozen=True)
class FastV(TokenMethod):
    """Before layer K keep the top (1 - R) N image tokens by the last token's attention in layer K - 1; drop the others.

    The same as ``drop`` with one step. Deviations: tokens really leave (the released masking variant saves nothing),
    any batch and any number of images work, positions keep their gaps, and the count rounds as all steps do (half to
    even of what goes).

    Args:
        layer: K, from 1.
        ratio: 1 - R, share kept, in (0, 1].

    Raises:
        UserError: a number out of range.

    Source: Chen et al. 2024, arXiv 2403.06764; rule as in LightVLM 5.
    """

    stages: ClassVar[tuple[str, ...]] = ("llm",)

    layer: int = 2
    ratio: float = 0.5

    def __post_init__(self) -> None:
        check_ratio("fastv", self.ratio)
        if self.layer < 1:
            raise UserError(f"fastv: layer={self.layer}; no score exists before layer 1")

    def schedule(self) -> Schedule:
        """One step."""
        return [Step("llm", self.layer, ratio=self.ratio)]

    def score(self, stage: str) -> ScoreKind:
        """Attention of the last prompt token."""
        return "last"

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Drop all but the top ``keep``."""
        assert tokens.scores is not None
        return drop(tokens.x, tokens.scores, keep, tokens.sizes, tokens.trace)
