"""The model's own mask with its columns gathered at what a cache layer holds (LightVLM 7.1.2, 7.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from polymodal.errors import UserError
from torch import Tensor

if TYPE_CHECKING:
    from vlm_accel.llm.cache import Rows

__all__ = ["layer_mask"]


def layer_mask(
    mask: Tensor | None, keys: Rows, queries: Rows | None, past: int, flash: bool, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Mask of one layer.

    Args:
        mask: of the full prompt: None, (B, 1, q, n) bool or additive, or (B, n) for FlashAttention.
        keys: all rows that the layer's attention sees, cached and new.
        queries: the new rows; None: one row for each query of ``mask``, as it is.
        past: logical tokens before this forward.
        flash: the layer takes 2-D masks.
        heads: H, query heads.
        dtype: of the hidden states, for additive masks.

    Returns:
        (B, 1 or H, q', n') bool or additive, (B, n') for FlashAttention, or None where None still says it all.

    Raises:
        UserError: FlashAttention, padding, and entries chosen per head at once.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise UserError("masks of flex attention are not supported; use SDPA or eager attention")
    if flash or (mask is not None and mask.dim() == 2):
        return _flash(mask, keys)
    if mask is None:
        if not keys.holes and keys.bias is None:
            return None
        mask = _explicit(keys, queries)
    else:
        mask = _gather(mask, keys, queries, past, heads)
    return mask if keys.bias is None else _with_bias(mask, keys, heads, dtype)


def _gather(mask: Tensor, keys: Rows, queries: Rows | None, past: int, heads: int) -> Tensor:
    """Rows of the queries, columns of the keys; columns of padding are blocked, rows of padding see themselves."""
    blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    index = keys.index
    mask = mask.expand(index.shape[0], *mask.shape[1:])
    if queries is not None:
        at = (queries.index - past).clamp(min=0)
        mask = mask.gather(2, at[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
    at = index.clamp(min=0) if keys.holes else index
    if index.dim() == 3:
        at = at.repeat_interleave(heads // index.shape[1], dim=1)
        mask = mask.expand(-1, heads, -1, -1)
    else:
        at = at[:, None].expand(-1, mask.shape[1], -1)
    mask = mask.gather(3, at[:, :, None].expand(-1, -1, mask.shape[2], -1))
    if not keys.holes:
        return mask
    hole = _per_head(index < 0, heads)
    return _see_themselves(mask.masked_fill(hole[:, :, None], blocked), queries)


def _explicit(keys: Rows, queries: Rows | None) -> Tensor:
    """allowed(q, j) = valid_j and o_j <= o_q; rows of padding see themselves."""
    at = keys.index if keys.index.dim() == 3 else keys.index[:, None]
    valid = keys.valid if keys.valid.dim() == 3 else keys.valid[:, None]
    order = (at[:, :, -1:] if queries is None else queries.index[:, None])[..., None]
    return _see_themselves(valid[:, :, None] & (at[:, :, None] <= order), queries)


def _see_themselves(mask: Tensor, queries: Rows | None) -> Tensor:
    if queries is None or not queries.holes:
        return mask
    count, total = queries.count, mask.shape[-1]
    own = torch.zeros(count, total, dtype=torch.bool, device=mask.device)
    own[:, total - count :].fill_diagonal_(True)
    own = own[None, None] & (queries.index < 0)[:, None, :, None]
    return mask | own if mask.dtype == torch.bool else mask.masked_fill(own, 0)


def _with_bias(mask: Tensor, keys: Rows, heads: int, dtype: torch.dtype) -> Tensor:
    """Additive, with the log sizes of the keys."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    bias = _per_head(keys.log_sizes(), heads)[:, :, None].to(mask.dtype)
    blocked = torch.finfo(mask.dtype).min
    return torch.where(mask <= blocked / 2, mask, mask + bias)


def _per_head(rows: Tensor, heads: int) -> Tensor:
    """(B, n) -> (B, 1, n); (B, K, n) -> (B, H, n)."""
    return rows[:, None] if rows.dim() == 2 else rows.repeat_interleave(heads // rows.shape[1], dim=1)


def _flash(mask: Tensor | None, keys: Rows) -> Tensor | None:
    """2-D masks; not run in our tests, FlashAttention cannot be installed there."""
    if mask is None and not keys.holes:
        return None
    if keys.index.dim() == 3:
        raise UserError("FlashAttention cannot mask padding per head; use KVBudget(per_head=False) or SDPA")
    if mask is None:
        return keys.valid
    picked = mask.gather(1, keys.index.clamp(min=0))
    return picked & keys.valid if picked.dtype == torch.bool else picked * keys.valid.to(picked.dtype)
