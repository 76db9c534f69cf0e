"""Importance of image tokens from one decoder layer, without attention maps (LightVLM 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_accel.llm.positions import Rope, head_counts, rotated_keys, rotated_queries

__all__ = ["SCORES", "LayerView", "last", "received", "self_", "text"]

#: queries whose attention is computed at once
CHUNK = 128


@dataclass
class LayerView:
    """One decoder layer when a step is due: the layer before the step (for ``self``: the step's own).

    Args:
        module: its attention module.
        hidden: (B, t, D) what that was called with (normed).
        x: (B, t, D) what enters the step's layer.
        mask: the layer's mask: None, (B, 1 or H, t, n) bool or additive, or (B, n).
        visible, image: (B, t) bool. span: (B, t) int64; -1: text.
        rope: its position embeddings.
        cached: (B, K, n, d) rotated keys in its cache, the last t of them of these rows; None: no cache.
        tail: text rows after the last image token, of the sample that has most.
        embeds: (B, t0, D) what entered layer 0; embeds_image, embeds_visible: (B, t0) bool; origin: (B, t) int64 row of
            ``embeds`` of each row, -1 for padding. Only where the method has ``own_llm_scores``.
    """

    module: nn.Module
    hidden: Tensor
    x: Tensor
    mask: Tensor | None
    visible: Tensor
    image: Tensor
    span: Tensor
    rope: Rope | None
    cached: Tensor | None = None
    tail: int = 1
    embeds: Tensor | None = None
    embeds_image: Tensor | None = None
    embeds_visible: Tensor | None = None
    origin: Tensor | None = None

    @property
    def scaling(self) -> float:
        """Factor of the attention logits."""
        size = head_counts(self.module)[2]
        return float(getattr(self.module, "scaling", size**-0.5))

    def keys(self, rope: bool = True) -> Tensor:
        """(B, K, t, d) keys of these rows; ``rope=False``: before the rotation."""
        if not rope:
            return rotated_keys(self.module, self.hidden, None)
        return self.all_keys()[:, :, -self.hidden.shape[1] :]

    def all_keys(self) -> Tensor:
        """(B, K, n, d) rotated keys that the layer sees, cached ones of earlier turns in front."""
        if self.cached is None:
            self.cached = rotated_keys(self.module, self.hidden, self.rope)
        return self.cached

    def queries(self, rows: Tensor | None = None, rope: bool = True) -> Tensor:
        """(B, H, r, d) queries of rows (B, r); None: all."""
        return rotated_queries(self.module, self.hidden, self.rope if rope else None, rows)

    def last_row(self) -> Tensor:
        """(B, 1) int64: the last visible row of each sample."""
        at = torch.arange(self.visible.shape[1], device=self.visible.device)
        return (self.visible * at).amax(1, keepdim=True)

    def attention(self, rows: Tensor) -> Tensor:
        """(B, H, r, t) float32 attention of the rows (B, r) on all t rows; the softmax runs over all visible keys."""
        return self._softmax(rows)[..., -self.visible.shape[1] :]

    def _softmax(self, rows: Tensor) -> Tensor:
        heads, kv_heads, _ = head_counts(self.module)
        queries, keys = self.queries(rows), self.all_keys()
        batch, _, count, size = queries.shape
        grouped = queries.reshape(batch, kv_heads, heads // kv_heads * count, size)
        logits = (grouped @ keys.transpose(2, 3)).reshape(batch, heads, count, -1).float() * self.scaling
        cap = getattr(self.module, "attn_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return self._masked(logits, rows).softmax(-1)

    def _masked(self, logits: Tensor, rows: Tensor) -> Tensor:
        blocked = torch.finfo(logits.dtype).min
        new, total = self.visible.shape[1], logits.shape[-1]
        if self.mask is not None and self.mask.dim() == 4:
            at = rows[:, None, :, None].expand(-1, self.mask.shape[1], -1, self.mask.shape[-1])
            mask = self.mask.expand(rows.shape[0], -1, -1, -1).gather(2, at)
            logits = logits.masked_fill(~mask, blocked) if mask.dtype == torch.bool else logits + mask.float()
        else:
            at = torch.arange(total, device=rows.device)
            logits = logits.masked_fill((at > rows[..., None] + (total - new))[:, None], blocked)
            if self.mask is not None:
                logits = logits.masked_fill(~self.mask.bool()[:, None, None], blocked)
        hidden = torch.nn.functional.pad(~self.visible, (total - new, 0))
        return logits.masked_fill(hidden[:, None, None], blocked)


def last(view: LayerView) -> Tensor:
    """Attention of the last prompt token, mean over heads (FastV): (B, t) float32. Cost: D^2 + t D MAC."""
    return view.attention(view.last_row()).mean(1)[:, 0]


#: the same rule on the step's own layer (PyramidDrop); the engine builds the view accordingly
self_ = last


def text(view: LayerView) -> Tensor:
    """Mean attention of the text tokens after the last image token of each sample (the last token where none is)."""
    new = view.visible.shape[1]
    at = torch.arange(new, device=view.visible.device)
    final = view.last_row()
    after = torch.where(view.image, at, -1).amax(1, keepdim=True)
    after = torch.minimum(after, final - 1)
    back = torch.arange(max(1, min(view.tail, new)) - 1, -1, -1, device=at.device)
    rows = final - back
    weight = (rows > after).float()
    return _mean_over(view, rows.clamp(min=0), weight) / weight.sum(1, keepdim=True)


def received(view: LayerView) -> Tensor:
    """Attention received from all queries, divided by the number of queries that can see the key (H2O-like)."""
    batch, new = view.visible.shape
    rows = torch.arange(new, device=view.visible.device).expand(batch, new)
    weight = view.visible.float()
    seen = weight.flip(1).cumsum(1).flip(1)
    return _mean_over(view, rows, weight) / seen.clamp(min=1)


def _mean_over(view: LayerView, rows: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum over rows (B, r), chunk by chunk, mean over heads: (B, t)."""
    total = torch.zeros(view.visible.shape, device=rows.device)
    for some, share in zip(rows.split(CHUNK, 1), weight.split(CHUNK, 1), strict=True):
        total = total + torch.einsum("bhrt,br->bt", view.attention(some), share) / head_counts(view.module)[0]
    return total


SCORES: dict[str, Callable[[Any], Tensor]] = {"last": last, "self": self_, "text": text, "received": received}
