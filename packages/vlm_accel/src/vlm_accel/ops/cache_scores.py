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
    sums, _, queries = attention_sums(view, window)
    scores = sums / queries.clamp(min=1)[:, None, None]
    return pool_scores(scores, view.budget.pool if pool is None else pool)


def pool_scores(scores: Tensor, kernel: int) -> Tensor:
    """Average over ``kernel`` (odd) neighbouring entries, zeros beyond the ends; scores (B, K, n)."""
    return scores if kernel == 1 else F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)


def attention_sums(view: CacheView, window: int | None = None, chunk: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over queries of the attention that each entry gets, mean over the query heads of its group.

    Args:
        view: the layer.
        window: last queries used; None: all.
        chunk: queries at a time; no map larger than (B, H, chunk, n) exists.

    Returns:
        sums (B, K, n) float32; seen (B, K, n): queries that could see the entry; queries (B,): queries that count.
    """
    queries, index = view.queries, _query_index(view)
    if window is not None:
        queries, index = queries[:, :, -window:], index[:, -window:]
    kind = torch.promote_types(queries.dtype, torch.float32)
    sums = torch.zeros(view.valid.shape, dtype=kind, device=queries.device)
    seen = torch.zeros_like(sums)
    for q, at in zip(queries.split(chunk, 2), index.split(chunk, 1), strict=True):
        visible = view.valid[:, :, None] & (view.index[:, :, None] <= at[:, None, :, None])
        sums += _attention(q, view.keys, visible, view.scaling, view.softcap, kind).sum(2)
        seen += visible.sum(2)
    return sums, seen, (index >= 0).sum(1).to(kind)


def _query_index(view: CacheView) -> Tensor:
    """(B, w) logical positions of the queries, -1 where a query is padding."""
    if view.query_index is not None:
        return view.query_index
    count = view.queries.shape[2]
    tail = view.index[:, 0, view.index.shape[2] - count :]
    return torch.where(view.valid[:, 0, view.index.shape[2] - count :], tail, -1)


def _attention(
    q: Tensor, keys: Tensor, visible: Tensor, scaling: float, cap: float | None, kind: torch.dtype
) -> Tensor:
    """Attention (B, K, w, n) of queries (B, H, w, d), mean over each group; zero for a query that sees nothing."""
    batch, heads, count, size = q.shape
    kv_heads = keys.shape[1]
    # the heads of a group lie side by side, so that one product with their keys serves them all
    grouped = q.reshape(batch, kv_heads, heads // kv_heads * count, size)
    logits = (grouped @ keys.transpose(2, 3)).to(kind).view(batch, kv_heads, -1, count, keys.shape[2]) * scaling
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    blind = ~visible[:, :, None]
    logits = logits.masked_fill(blind, torch.finfo(kind).min)
    # the second fill matters for a query that sees nothing: its row would be uniform
    return logits.softmax(-1).masked_fill(blind, 0.0).mean(2)
