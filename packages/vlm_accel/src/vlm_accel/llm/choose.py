"""Which entries stay, from scores: protected ones, then the best, padding last (LightVLM 3.6, step 3; AdaKV)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.budget import KVBudget

__all__ = ["choose", "choose_across_heads", "protected_entries"]


def protected_entries(
    budget: KVBudget, valid: Tensor, index: Tensor, image: Tensor, first_image: Tensor | None = None
) -> Tensor:
    """Entries that must stay: the first ``sink`` valid ones, the last ``recent`` ones, and what the scope protects.

    Args:
        budget: its sink, recent and scope.
        valid: (B, K, n) bool, False for padding.
        index: (B, K, n) int64 logical positions, ascending.
        image: (B, K, n) bool, entries of image tokens.
        first_image: (B, 1) int64 logical position of the first image entry, -1: none; for ``no_system``. Without an
            image nothing can be told to be the system prompt, so nothing is.

    Returns:
        (B, K, n) bool.
    """
    count = valid.shape[-1]
    stay = (valid.cumsum(-1) <= budget.sink) | (torch.arange(count, device=valid.device) >= count - budget.recent)
    if budget.scope == "image":
        stay = stay | ~image
    elif budget.scope == "no_system" and first_image is not None:
        stay = stay | (index < first_image[:, None])
    return stay & valid


def choose(scores: Tensor, valid: Tensor, stay: Tensor, entries: int) -> Tensor:
    """Rows of the ``entries`` best entries; ties: the lower row is more important.

    Args:
        scores: (..., n), higher = keep.
        valid: (..., n) bool; False goes first.
        stay: (..., n) bool; True goes last.
        entries: how many.

    Returns:
        (..., entries) int64, ascending.
    """
    order = _ranked(scores, valid, stay).argsort(dim=-1, descending=True, stable=True)
    return order[..., :entries].sort(-1).values


def choose_across_heads(scores: Tensor, valid: Tensor, stay: Tensor, entries: int, safe: float = 0.2) -> Tensor:
    """Heads compete: each keeps its best ``int(safe * entries)``, the rest of K * ``entries`` goes to the best of all.

    Source: AdaKV as in LightVLM 5.

    Args:
        scores: (B, K, n), higher = keep.
        valid: (B, K, n) bool; False goes first.
        stay: (B, K, n) bool; True goes last.
        entries: mean number a head.
        safe: share that every head keeps.

    Returns:
        (B, K, n) bool, ``K * entries`` of them True in each sample (padding among them where there is too little else).
    """
    ranked = _ranked(scores, valid, stay)
    own = ranked.argsort(dim=-1, descending=True, stable=True)[..., : int(safe * entries)]
    safe_ones = torch.zeros_like(valid).scatter(-1, own, True)
    ranked = torch.where(safe_ones & valid, torch.inf, ranked)
    flat = ranked.flatten(1)
    best = flat.argsort(dim=-1, descending=True, stable=True)[:, : scores.shape[1] * entries]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(-1, best, True).view_as(valid)


def _ranked(scores: Tensor, valid: Tensor, stay: Tensor) -> Tensor:
    """Scores with invalid entries at -inf and protected ones at +inf."""
    scores = scores.nan_to_num(nan=0.0, posinf=torch.finfo(scores.dtype).max, neginf=torch.finfo(scores.dtype).min)
    return torch.where(valid, torch.where(stay, torch.inf, scores), -torch.inf)
