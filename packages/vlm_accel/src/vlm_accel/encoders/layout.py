"""Where survivors go in the grids that the rest of a model expects (iLLaVA 3.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fill", "owners"]


def owners(index: Tensor, owner: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """For every cell of the grid the survivor that stands in for it.

    Args:
        index: (S, m) int64 cells of the survivors, row-major.
        owner: (S, N) int64 survivor that each cell's token merged into, -1: none; None: unknown.
        grid: (height, width), N cells.

    Returns:
        (S, N) int64: a survivor's own number at its cell; elsewhere the token that the cell merged into; where it went
        nowhere, the nearest survivor (Euclidean; ties: the first).
    """
    s, m = index.shape
    cells = grid[0] * grid[1]
    own = index.new_full((s, cells), -1)
    own = own.scatter(1, index, torch.arange(m, device=index.device).expand(s, m))
    found = own if owner is None else torch.where(own < 0, owner, own)
    # |a - b|^2 less |a|^2, which is the same for all survivors b; whole numbers, so that float32 is exact
    places = torch.stack((index // grid[1], index % grid[1]), 1).float()
    at = torch.arange(cells, device=index.device)
    here = torch.stack((at // grid[1], at % grid[1]), 1).float()
    distance = torch.baddbmm(places.square().sum(1, keepdim=True), here.expand(s, -1, -1), places, alpha=-2)
    nearest = distance.argmin(2)
    return torch.where(found < 0, nearest, found)


def fill(x: Tensor, index: Tensor, owner: Tensor | None, grid: tuple[int, int] | None) -> Tensor:
    """Survivors (S, m, D) back on the full grid (S, N, D), no cell empty; arguments as in ``owners``."""
    assert grid is not None
    found = owners(index, owner, grid)
    return x.gather(1, found[..., None].expand(-1, -1, x.shape[2]))
