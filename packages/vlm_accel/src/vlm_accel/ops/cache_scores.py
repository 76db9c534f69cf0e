"""How much the entries of a cache are attended to: the scores of window rules and of running sums (LightVLM 3.6, 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from vlm_accel.methods.base import CacheView

__all__ = ["attention_sums", "pool_scores", "window_scores"]


def window_scores(view: CacheView, window: int | None = None, pool: int | None = None) -> Tensor:
    """u_j = mean over the last queries and the group's query heads of softmax(q . k / sqrt(d))_j, then pooled.

    Causal, valid entries only, softmax in float32 (LightVLM 3.6, steps 1 and 2). Queries of padding count for nothing.

    Args:
        view: the layer; its ``queries`` (B, H, w, d).
        window: last queries used; None: ``view.budget.window``.
        pool: kernel of the average pooling; None: ``view.budget.pool``.

    Returns:
        (B, K, n) float32.
    """
    window = view.budget.window if window is None else window
    queries, index = view.queries[:, :, -window:], _query_index(view)[:, -window:]
    sums = torch.zeros(view.valid.shape, dtype=_kind(queries), device=queries.device)
    for q, at in zip(torch.split(queries, 128, 2), torch.split(index, 128, 1), strict=True):
        sums += _attention_sum(q, view, _visible(view, at))
    counted = (index >= 0).sum(1).clamp(min=1)
    scores = sums / counted[:, None, None]
    return pool_scores(scores, view.budget.pool if pool is None else pool)


def pool_scores(scores: Tensor, kernel: int) -> Tensor:
    """Average over ``kernel`` (odd) neighbouring entries, zeros beyond the ends; scores (B, K, n)."""
    return scores if kernel == 1 else F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)


def attention_sums(view: CacheView, chunk: int = 128) -> tuple[Tensor, Tensor]:
    """Sum over all queries of the attention that each entry gets, mean over the query heads of its group.

    Args:
        view: the layer.
        chunk: queries at a time; no map larger than (B, H, chunk, n) exists.

    Returns:
        sums (B, K, n) float32; seen (B, K, n): queries that could see the entry.
    """
    sums = torch.zeros(view.valid.shape, dtype=_kind(view.queries), device=view.queries.device)
    seen = torch.zeros_like(sums)
    for q, at in zip(torch.split(view.queries, chunk, 2), torch.split(_query_index(view), chunk, 1), strict=True):
        visible = _visible(view, at)
        sums += _attention_sum(q, view, visible)
        seen += visible.sum(2)
    return sums, seen


def _kind(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _query_index(view: CacheView) -> Tensor:
    """(B, w) logical positions of the queries, -1 where a query is padding."""
    if view.query_index is not None:
        return view.query_index
    start = view.index.shape[2] - view.queries.shape[2]
    return torch.where(view.valid[:, 0, start:], view.index[:, 0, start:], -1)


def _visible(view: CacheView, at: Tensor) -> Tensor:
    """(B, K, w, n) bool: entries that queries at the positions (B, w) could see."""
    return view.valid[:, :, None] & (view.index[:, :, None] <= at[:, None, :, None])


def _attention_sum(q: Tensor, view: CacheView, visible: Tensor) -> Tensor:
    """Attention of queries (B, H, w, d), summed over them, mean over each group: (B, K, n).

    A query that sees nothing counts for nothing.
    """
    batch, heads, count, size = q.shape
    kv_heads, entries = view.keys.shape[1:3]
    group = heads // kv_heads
    # the heads of a group lie side by side, so that one product with their keys serves them all
    rows = q.reshape(batch * kv_heads, group * count, size)
    keys = view.keys.flatten(0, 1).transpose(1, 2)
    logits = torch.baddbmm(rows.new_zeros(1), rows, keys, beta=0, alpha=view.scaling).to(_kind(q))
    if view.softcap is not None:
        logits = view.softcap * torch.tanh(logits / view.softcap)
    logits = logits.view(batch, kv_heads, group, count, entries)
    logits = logits.masked_fill_(~visible[:, :, None], torch.finfo(logits.dtype).min)
    # the mean over heads and the sum over queries are one more product
    counts = visible.any(-1)[:, :, None].expand(-1, -1, group, -1).to(logits.dtype) / group
    attention = logits.softmax(-1).view(batch, kv_heads, group * count, entries)
    return (counts.reshape(batch, kv_heads, 1, -1) @ attention)[:, :, 0]
