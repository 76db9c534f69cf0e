"""Truncated singular value decomposition as a compression of matrices: fewer numbers to send."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["expand", "pack", "rank_for", "truncate", "unpack"]

Shape = tuple[int, int, int]
"""(independent matrices, rows, cols)"""


def rank_for(rows: int, cols: int, ratio: float) -> int:
    """Rank whose factors take at most ``ratio`` of the matrix: ``floor(ratio * m n / (m + n + 1))``, at least 1.

    0 where the factors would take as much as the matrix itself (``ratio >= 1`` always): send the matrix.

    Args:
        rows: m.
        cols: n.
        ratio: numbers sent over numbers of the matrix, more than 0.

    Source: arXiv 2510.27403; at least 1 is ours (the authors' script can give 0).
    """
    if ratio >= 1:
        return 0
    rank = max(1, int(ratio * rows * cols / (rows + cols + 1)))
    return rank if rank * (rows + cols + 1) < rows * cols else 0


def truncate(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best approximation of a given rank, as factors.

    Args:
        matrices: (..., m, n).
        rank: r, at most min(m, n).

    Returns:
        Left (..., m, r) and right (..., r, n) singular vectors around the values (..., r), as (left, values, right).
    """
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    return left[..., :rank], values[..., :rank], right[..., :rank, :]


def expand(left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """The matrices (..., m, n) that the factors stand for."""
    return (left * values.unsqueeze(-2)) @ right


def pack(flat: Tensor, shapes: Iterable[Shape], ratio: float) -> Tensor:
    """Compress matrices that lie one after the other; ``unpack`` gives their best approximation of that rank.

    Args:
        flat: (..., sum of b m n) with matrices (b, m, n), row by row.
        shapes: of the tensors, in order.
        ratio: see ``rank_for``.

    Returns:
        (..., F): left vectors, values and right vectors of each tensor, or the tensor where that is no more.
    """
    parts: list[Tensor] = []
    at = 0
    for batch, rows, cols in shapes:
        size = batch * rows * cols
        part, rank = flat[..., at : at + size], rank_for(rows, cols, ratio)
        at += size
        if rank:
            factors = truncate(part.reshape(*part.shape[:-1], batch, rows, cols), rank)
            parts.extend(f.flatten(-2 if i == 1 else -3) for i, f in enumerate(factors))
        else:
            parts.append(part)
    return torch.cat(parts, dim=-1) if parts else flat


def unpack(packed: Tensor, shapes: Iterable[Shape], ratio: float) -> Tensor:
    """Matrices (..., sum of b m n) from what ``pack`` made of them, with the same shapes and ratio."""
    parts, at = [], 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        size = math.prod(shape)
        at += size
        return packed[..., at - size : at].reshape(*packed.shape[:-1], *shape)

    for batch, rows, cols in shapes:
        rank = rank_for(rows, cols, ratio)
        if rank:
            matrices = expand(take(batch, rows, rank), take(batch, rank), take(batch, rank, cols))
        else:
            matrices = take(batch, rows, cols)
        parts.append(matrices.flatten(-3))
    return torch.cat(parts, dim=-1) if parts else packed
