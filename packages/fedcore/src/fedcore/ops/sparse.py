"""Sparse vectors: the largest entries of each tensor, and common random coordinates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from polymodal.seeding import generator
from torch import Tensor

__all__ = ["keep_largest", "random_coordinates"]


def keep_largest(flat: Tensor, spans: Iterable[tuple[int, int]], share: float) -> Tensor:
    """Set all but the largest entries of each span to zero, by absolute value.

    Args:
        flat: (..., P); not changed.
        spans: first index and one past the last of each tensor.
        share: of the entries of a span that stay, rounded up, 0 < share <= 1; 1 is the identity.

    Returns:
        (..., P).
    """
    if share >= 1:
        return flat
    kept = torch.zeros_like(flat)
    for start, stop in spans:
        part = flat[..., start:stop]
        count = math.ceil(share * (stop - start))
        places = part.abs().topk(count, dim=-1, sorted=False).indices
        kept[..., start:stop].scatter_(-1, places, part.gather(-1, places))
    return kept


@lru_cache(maxsize=2)
def random_coordinates(size: int, count: int, seed: int, round: int) -> Tensor:
    """``count`` of ``size`` coordinates, uniformly without replacement, rising, int64; a function of seed and round.

    Args:
        size: P.
        count: how many, at most P.
        seed: public.
        round: index of the round.
    """
    draw = generator(seed, "coordinates", round)
    return torch.randperm(size, generator=draw)[:count].sort().values
