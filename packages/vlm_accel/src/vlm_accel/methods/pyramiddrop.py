"""PyramidDrop: at three depths the less attended share of the image tokens goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polymodal.errors import UserError

from vlm_accel.methods._features import check_ratio
from vlm_accel.methods.base import Reduced, TokenMethod, Tokens
from vlm_accel.ops import drop
from vlm_accel.schedule import Pyramid, Schedule

if TYPE_CHECKING:
    from vlm_accel.methods.base import ScoreKind

__all__ = ["PyramidDrop"]


@dataclass(frozen=True)
class PyramidDrop(TokenMethod):
    """Before layers 8, 16, 24 of 32 (at the same shares of other depths) keep 1/2, 1/4, 1/8 of the N_0 image tokens.

    Counts are truncated, int(N * share). Score ``self``: the last token's query against the image keys, both as layer k
    itself makes them from what enters it. Deviation: each step truncates its own share of the count before it, which
    for halves is the same as truncating the cumulative share of N_0; for other ratios it may be one less.

    Args:
        ratio: share of N_0 left at the end, in (0, 1]; each step keeps ratio ** (1 / steps).
        layers: layers before which tokens go, ascending from 1, for a model of ``of`` layers.
        of: that depth; None: ``layers`` are meant as they are.

    Raises:
        UserError: a number out of range.

    Source: Xing et al. 2024, arXiv 2410.17247 (CVPR 2025); rule as in LightVLM 5 (read in the authors' code).
    """

    stages: ClassVar[tuple[str, ...]] = ("llm",)

    ratio: float = 0.125
    layers: tuple[int, ...] = (8, 16, 24)
    of: int | None = 32

    def __post_init__(self) -> None:
        check_ratio("pyramiddrop", self.ratio)
        check_layers("pyramiddrop", self.layers)

    def schedule(self) -> Schedule:
        """Steps that find their layers when the depth is known."""
        layers = tuple(self.layers)
        each = self.ratio ** (1 / len(layers))
        return [Pyramid(self.ratio, layers, ratios=(each,) * len(layers), of=self.of, truncate=True)]

    def score(self, stage: str) -> ScoreKind:
        """Attention of the last prompt token in the step's own layer."""
        return "self"

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Drop all but the top ``keep``."""
        assert tokens.scores is not None
        return drop(tokens.x, tokens.scores, keep, tokens.sizes, tokens.trace)


def check_layers(name: str, layers: tuple[int, ...]) -> None:
    """UserError unless ``layers`` ascend from 1 on."""
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 1:
        raise UserError(f"{name}: layers={list(layers)}; expected ascending layers from 1 (layer 0 has no score yet)")
