"""Average pooling on the patch grid to an exact number of tokens: a control that looks at no scores (iLLaVA 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_accel.methods.base import Reduced, Trace
from vlm_accel.ops._select import add_rows, check, identity, masses, mean_weight, wide

__all__ = ["pool"]


def pool(
    x: Tensor,
    keep: int,
    grid: tuple[int, int] | None = None,
    index: Tensor | None = None,
    sizes: Tensor | None = None,
    trace: Trace = True,
) -> Reduced:
    """Average neighbouring tokens into ``keep`` means.

    A complete grid for which ``keep`` is the count of a k x k pooling in ceil mode is pooled so (squares at the right
    and lower edge are means of the cells that are there). Every other count is met exactly by nearly square bins of
    nearly equal counts: rows are cut into strips from top to bottom, each strip into bins from left to right; by rank
    among the tokens that are there, so that tokens left by earlier steps are pooled by the same rule.

    Args:
        x: (S, N, D).
        keep: M, within [1, N]; N gives back the same tensor.
        grid: (height, width) of the tokens before any step; None: runs of neighbours in the sequence.
        index: (S, N) place of each row in that grid; None: all rows are there (N = height * width).
        sizes: (S, N) source tokens of each row; None: ones. Means are weighted by them, so that a bin is the mean of
            its patches also where tokens were pooled before.
        trace: whether ``assign`` and ``weight`` are wanted; ``"assign"``: the former only.

    Returns:
        ``Reduced``; a bin stands at the place of its middle token.

    Source: control of iLLaVA and LightVLM (iLLaVA 5, LightVLM 5); the exact count is ours.
    """
    check(x, keep)
    s, n = x.shape[:2]
    if keep == n:
        return identity(x, sizes)
    side = _kernel(grid, n, keep)
    if side:
        assert grid is not None
        bins, middle = _squares(grid, side, x.device)
        bins, middle = bins.expand(s, n), middle.expand(s, keep)
    else:
        bins, middle = _bins(s, n, keep, grid, index, x.device)
    kept, order = middle.sort(-1)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(keep, device=x.device).expand(s, keep))
    owner = rank.gather(1, bins)
    mass = masses(x, sizes)
    total = add_rows(torch.zeros(s, keep, dtype=mass.dtype, device=x.device), owner, mass)
    means = torch.zeros(s, keep, x.shape[2], dtype=wide(x).dtype, device=x.device)
    means = add_rows(means, owner, wide(x) * mass[..., None].to(means.dtype)) / total[..., None]
    reduced = Reduced(x=means.to(x.dtype), kept=kept, sizes=total)
    if trace:
        reduced.assign = owner
    if trace is True:
        reduced.weight = mean_weight(owner, mass, keep)
    return reduced


def _kernel(grid: tuple[int, int] | None, tokens: int, keep: int) -> int:
    """Side k of the k x k pooling that leaves ``keep`` of a complete grid; 0: there is none."""
    if grid is None or grid[0] * grid[1] != tokens:
        return 0
    height, width = grid
    for k in range(2, max(height, width) + 1):
        if -(-height // k) * -(-width // k) == keep:
            return k
    return 0


def _squares(grid: tuple[int, int], k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bin (N,) of every cell, and the middle cell (M,) of every bin, both in raster order."""
    height, width = grid
    rows, columns = torch.arange(height, device=device) // k, torch.arange(width, device=device) // k
    across = -(-width // k)
    bins = (rows[:, None] * across + columns).flatten()
    down = _middles(height, k, device)
    return bins, (down[:, None] * width + _middles(width, k, device)).flatten()


def _middles(length: int, k: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, length, k, device=device)
    return (starts + (starts + k - 1).clamp(max=length - 1)) // 2


def _bins(
    s: int, n: int, keep: int, grid: tuple[int, int] | None, index: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Bin (S, N) of every row, and the middle row (S, M) of every bin, for bins of nearly equal counts."""
    ranks = torch.arange(n, device=device)
    bin_of_rank = ranks * keep // n
    starts = -(-torch.arange(keep + 1, device=device) * n // keep)
    middle_rank = (starts[:-1] + starts[1:] - 1) // 2
    if grid is None:
        return bin_of_rank.expand(s, n), middle_rank.expand(s, keep)
    height, width = grid
    strips = min(keep, max(1, round((keep * height / width) ** 0.5)))
    strip = ((bin_of_rank + 1) * strips - 1) // keep
    place = ranks.expand(s, n) if index is None else index
    row, column = place // width, place % width
    # Within a strip from left to right, and from top to bottom within a column.
    order = ((strip * width + column) * height + row).argsort(-1)
    bins = torch.empty_like(order).scatter_(1, order, bin_of_rank.expand(s, n))
    return bins, order.gather(1, middle_rank.expand(s, keep))
