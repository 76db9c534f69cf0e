"""LightVLM: a pyramid of merging in the decoder, and a cache that keeps what the last queries attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from polymodal.errors import UserError

from vlm_accel.methods._scored import ScoredMethod, one_of
from vlm_accel.methods.base import CacheMethod, CacheView, Reduced, Tokens
from vlm_accel.ops.assignment import AssignWeights, assign
from vlm_accel.schedule import Schedule, pyramid

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.budget import KVBudget

__all__ = ["LightVLM"]


@dataclass(frozen=True)
class LightVLM(ScoredMethod, CacheMethod):
    """Every removed token joins the kept token that it resembles most; the cache keeps what the window attends to.

    Args:
        target: share of the image tokens that the default pyramid leads to (the paper's settings: 0.35 and 0.03).
        meaning: whether ``target`` is the share after the ``final`` step or the ``mean`` over all layers.
        layers: of the pyramid; None: 2, L // 3, 2 L // 3 of L layers.
        weights: of the mean: ``size`` (tokens that a row stands for) or ``score`` (size times score).

    Degenerate cases: keep = N is the identity; a cache budget of at least the cache's length changes nothing.

    Source: Hu et al. 2025, LightVLM (arXiv 2509.00419). The paper's method section could not be read and there is no
    code: the pyramid, ``assign`` (LightVLM 3.4) and the cache rule (3.6) are our reading of its abstract.
    """

    stages: ClassVar[tuple[str, ...]] = ("vision", "llm", "cache")

    target: float = 0.35
    meaning: Literal["final", "mean"] = "final"
    layers: tuple[int, ...] | None = None
    weights: AssignWeights = "size"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("weights", self.weights, get_args(AssignWeights))
        if not 0 < self.target <= 1:
            raise UserError(f"lightvlm: target={self.target}; expected a share kept in (0, 1], 0.35 keeps 35 %")

    def schedule(self) -> Schedule:
        """The pyramid to ``target``."""
        return pyramid(self.target, self.layers, self.meaning)

    def kv(self) -> KVBudget | None:
        """None: the cache is compressed only where a budget is given (or a preset has one)."""
        return None

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Merge ``tokens`` to ``keep`` rows."""
        assert tokens.scores is not None
        return assign(tokens.x, tokens.scores, keep, tokens.sizes, self.weights, tokens.trace)

    def entry_scores(self, view: CacheView) -> Tensor:
        """Attention of the last queries, (B, K, n) float32 (LightVLM 3.6)."""
        from vlm_accel.ops.cache_scores import window_scores

        return window_scores(view)
