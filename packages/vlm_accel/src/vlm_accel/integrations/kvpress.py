"""Scorers of NVIDIA/kvpress as cache methods, by their shape alone: kvpress is not needed, nor imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from polymodal.errors import UserError

from vlm_accel.budget import KVBudget
from vlm_accel.methods.base import CacheMethod

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.methods.base import CacheView

__all__ = ["ScorerMethod"]


@dataclass(frozen=True)
class ScorerMethod(CacheMethod):
    """Any object with kvpress' ``score(module, hidden_states, keys, values, attentions, kwargs) -> (B, K, n)``.

    What it gets: ``hidden_states`` (B, q, D), the whole input of the attention after a prefill, the last inputs while
    decoding (as in kvpress' DecodingPress); ``keys`` and ``values`` (B, K, n, d) as cached; ``attentions`` None (no map
    is made; scorers that need one cannot run); ``kwargs`` of the attention call, with ``position_embeddings`` of just
    those hidden states and with ``cache_position`` (q,), which transformers 5 no longer passes. While it runs, the
    attention module has ``rotary_emb``, which kvpress sets too.

    Padding, protected entries and the budget are the engine's; scorers that assume a batch without padding score it
    all the same, and padding still goes first.

    Source: LightVLM 7.3 (arXiv 2509.00419).

    Args:
        scorer: the object. Its ``window_size``, where it has one, says how many inputs it wants while decoding, and its
            ``compression_ratio`` (share removed) is the budget when the user gives none.
    """

    scorer: Any
    needs_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(getattr(self.scorer, "score", None)):
            raise UserError(f"{type(self.scorer).__name__} has no score(...); expected an object like a kvpress scorer")

    @property
    def window(self) -> int:
        """Inputs kept for decoding: one more than its window, as such scorers ask."""
        return int(getattr(self.scorer, "window_size", 0)) + 1

    def kv(self) -> KVBudget:
        """``1 - compression_ratio`` of each layer's prefill, or half."""
        removed = getattr(self.scorer, "compression_ratio", None)
        if removed is None:
            return KVBudget.ratio(0.5)
        if not 0 <= removed < 1:
            raise UserError(f"compression_ratio={removed} of {type(self.scorer).__name__}; expected a share in [0, 1)")
        return KVBudget.ratio(1.0 - removed, sink=0, recent=0, window=1)

    def entry_scores(self, view: CacheView) -> Tensor:
        """What the scorer says, checked for its shape."""
        hidden = view.hidden
        assert hidden is not None
        end = int(view.kwargs.get("logical", view.keys.shape[2]))
        kwargs = {
            **view.kwargs,
            "hidden_states": hidden,
            "cache_position": torch.arange(end - hidden.shape[1], end, device=hidden.device),
        }
        kwargs.setdefault("past_key_values", kwargs.get("cache"))
        with _rotary(view.module, view.kwargs.get("rotary_emb")):
            scores = self.scorer.score(view.module, hidden, view.keys, view.values, None, kwargs)
        if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != tuple(view.keys.shape[:3]):
            got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise UserError(
                f"{type(self.scorer).__name__}.score gave {got}; expected (B, K, n) = {tuple(view.keys.shape[:3])}"
            )
        return scores.float()


@contextmanager
def _rotary(module: Any, rotary: Any) -> Iterator[None]:
    """The decoder's rotary embedding at its attention module, as a plain attribute and for this long only."""
    if rotary is None or hasattr(module, "rotary_emb"):
        yield
        return
    module.__dict__["rotary_emb"] = rotary
    try:
        yield
    finally:
        del module.__dict__["rotary_emb"]
