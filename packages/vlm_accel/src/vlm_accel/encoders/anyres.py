"""Which patch of which tile each placeholder row of a picture shows, learnt from the model's own packing code.

LLaVA-NeXT and OneVision lay the tiles of a picture side by side, cut the padding off, pool where there are too many
cells, and end each line with a newline; videos are pooled frame by frame. That code is run once more, on the CPU, with
four channels in place of features: "is a base patch", row, column, "is a newline". Pooling is bilinear, so that rows
and columns come out as the exact place of the pooled cell: its two by two source patches and their weights follow.
Tables are made once for each size of picture; nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Packing", "Table"]


@dataclass
class Table:
    """The tables of a ``Packing`` on one device; see there."""

    source: Tensor
    weight: Tensor
    base: Tensor
    newline: Tensor
    line: Tensor
    kept_newline: Tensor


@dataclass
class Packing:
    """P placeholder rows of one picture (or of one frame).

    Args:
        tiles, patches: tiles of the picture, N patches of each.
        source: (P, k) int64 tile * N + patch; k = 1, or 4 where cells are pooled. 0 with weight 0 where there is none.
        weight: (P, k) float32, rows sum to 1; 0 for newlines.
        base: (P,) bool, rows of the base tile (the whole picture, never pooled).
        newline: (P,) bool.
        line: (P,) int64 line of the tiles' grid, 0 for the base (a newline belongs to the line that it ends).
        column: (P,) int64 place in the line, in the base: the patch.
        pooled: whether cells mix patches.
        size: (lines, columns) of the tiles' grid; (0, 0): base only.
    """

    tiles: int
    patches: int
    source: np.ndarray
    weight: np.ndarray
    base: np.ndarray
    newline: np.ndarray
    line: np.ndarray
    column: np.ndarray
    pooled: bool
    size: tuple[int, int]
    _tables: dict[torch.device, Table] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        pack: Callable[[Tensor, Tensor], Tensor],
        side: tuple[int, int],
        tiles: tuple[int, int],
        frame: bool = False,
    ) -> Packing:
        """Learn a packing.

        Args:
            pack: (features (tiles, N, C), newline (C,)) -> (P, C), the model's own code.
            side: (height, width) of a tile in patches.
            tiles: (rows, columns) of tiles behind the base tile; (0, 0): only the base.
            frame: the one tile is a frame of a video, which has a grid but no base.
        """
        seen = pack(_channels(side, tiles, frame), torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64))
        base, row, column, newline = seen.numpy().T
        is_base, is_newline = base > 0.5, newline > 0.5
        pooled = _is_pooled(row[~is_base & ~is_newline], column[~is_base & ~is_newline])
        height, width = (side if frame else (side[0] * tiles[0], side[1] * tiles[1])) if tiles[0] or frame else side
        source, weight = _corners(row, column, (height, width), pooled)
        n = side[0] * side[1]
        y, x = np.divmod(source, max(width, 1))
        tile = 0 if frame else 1 + y // side[0] * max(tiles[1], 1) + x // side[1]
        inside = y % side[0] * side[1] + x % side[1]
        source = np.where(is_base[:, None], _patch(row, column, side)[:, None], tile * n + inside)
        weight[is_newline] = 0
        source[is_newline] = 0
        line, place, size = _lines(is_base, is_newline, row)
        return cls(
            1 + tiles[0] * tiles[1], n, source.astype(np.int64), weight.astype(np.float32), is_base, is_newline, line,
            place, pooled, size,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """P."""
        return len(self.base)

    def on(self, device: torch.device) -> Table:
        """The tables on ``device``, copied there once."""
        if device not in self._tables:
            full = np.zeros(1 + int(self.line.max(initial=0)), bool)
            full[self.line[~self.base & ~self.newline]] = True
            arrays = (
                self.source, self.weight, self.base, self.newline, self.line, self.newline & ~full[self.line],
            )  # fmt: skip
            self._tables[device] = Table(*(torch.from_numpy(array.copy()).to(device) for array in arrays))
        return self._tables[device]

    def alive(self, alive: Tensor, score: Tensor | None, cells: int) -> Tensor:
        """Rows that stay (iLLaVA 3.6, ``scatter``).

        Unpooled: rows whose patch survived. Pooled: the ``cells`` cells with the largest share of survivors (ties:
        score, then order); the base is never pooled. A newline stays where its line has a row left, or ends no line.

        Args:
            alive: (..., tiles * N) float, 1 where a patch survived.
            score: (..., tiles * N) float32 or None.
            cells: of pooled cells, how many stay.

        Returns:
            (..., P) bool.
        """
        table = self.on(alive.device)
        share = _mixed(alive, table)
        rows = share > 0
        if self.pooled:
            # shares that are equal on paper differ in the last bit, and ties are to be decided by the score
            share = (share * 4096).round().masked_fill(table.base | table.newline, -1.0)
            order = torch.arange(self.rows, device=alive.device).expand_as(share)
            if score is not None:
                order = _mixed(score * alive, table).argsort(dim=-1, descending=True, stable=True)
            best = share.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
            chosen = order.gather(-1, best[..., :cells])
            rows = (rows & table.base).scatter(-1, chosen, True)
        lines = rows.new_zeros(*rows.shape[:-1], 1 + int(self.line.max(initial=0)), dtype=torch.int64)
        inner = (rows & ~table.base & ~table.newline).long()
        lines = lines.scatter_add(-1, table.line.expand_as(inner), inner)
        return rows | (table.newline & (lines.gather(-1, table.line.expand_as(inner)) > 0)) | table.kept_newline


def _mixed(values: Tensor, table: Table) -> Tensor:
    """(..., tiles * N) -> (..., P): weighted mean over the sources of each row."""
    return (values[..., table.source] * table.weight.to(values.dtype)).sum(-1)


def _channels(side: tuple[int, int], tiles: tuple[int, int], frame: bool) -> Tensor:
    """(tiles, N, 4) float64: base flag, row, column, newline flag."""
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in side), indexing="ij")
    none = torch.zeros_like(row)
    made = [torch.stack([none + (not frame), row, column, none], -1)]
    for down in range(tiles[0]):
        for across in range(tiles[1]):
            made.append(torch.stack([none, row + down * side[0], column + across * side[1], none], -1))
    return torch.stack(made).flatten(1, 2)


def _is_pooled(row: np.ndarray, column: np.ndarray) -> bool:
    """Whether the places are not a contiguous block of whole patches."""
    for places in (row, column):
        steps = np.diff(np.unique(np.round(places, 6)))
        if len(steps) and not np.allclose(steps, 1, atol=1e-5):
            return True
    return bool(len(row)) and not (np.allclose(row, row.round(), atol=1e-5) and np.allclose(column, column.round()))


def _corners(row: np.ndarray, column: np.ndarray, size: tuple[int, int], pooled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Places in a grid of ``size`` -> flat patches (P, k) and weights (P, k)."""
    if not pooled:
        flat = np.round(row).astype(np.int64) * size[1] + np.round(column).astype(np.int64)
        return flat[:, None], np.ones((len(flat), 1))
    top, left = np.floor(row + 1e-6).astype(np.int64), np.floor(column + 1e-6).astype(np.int64)
    down, right = np.clip(row - top, 0, 1), np.clip(column - left, 0, 1)
    low, far = np.minimum(top + 1, size[0] - 1), np.minimum(left + 1, size[1] - 1)
    source = np.stack([y * size[1] + x for y in (top, low) for x in (left, far)], 1)
    weight = np.stack([y * x for y in (1 - down, down) for x in (1 - right, right)], 1)
    return source, np.where(weight < 1e-5, 0, weight)


def _patch(row: np.ndarray, column: np.ndarray, side: tuple[int, int]) -> np.ndarray:
    return np.round(row).astype(np.int64) * side[1] + np.round(column).astype(np.int64)


def _lines(base: np.ndarray, newline: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Line and place in the line of each row, and the size of the tiles' grid."""
    cells = ~base & ~newline
    line = np.zeros(len(base), np.int64)
    place = np.zeros(len(base), np.int64)
    place[base] = np.arange(base.sum())
    grid = ~base
    if newline.any():
        ended = np.cumsum(newline) - newline
        line[grid] = ended[grid]
    elif cells.any():
        line[cells] = np.unique(np.round(row[cells], 6), return_inverse=True)[1].ravel()
    lines = int(line[cells].max() + 1) if cells.any() else 0
    columns = int(cells.sum()) // lines if lines else 0
    place[cells] = np.arange(cells.sum()) % max(columns, 1)
    place[newline] = columns
    return line, place, (lines, columns)


def spread(small: Packing, large: Packing, side: Sequence[int], full: Sequence[int]) -> np.ndarray:
    """Which rows of ``large`` carry the rows of ``small``, a packing of fewer cells of the same picture.

    Cell (r, c) of a grid of R x C goes to cell (floor((r + .5) H / R), floor((c + .5) W / C)) of the H x W one, a
    newline to that line's newline, base cells likewise within the base: in order, one row each, all over the picture.
    Unpadding rounds to whole cells on both sides, so that a small grid may have a line more than the full one (R > H,
    small pictures only): then H of its lines, evenly chosen, are placed; columns likewise.

    Args:
        small: packing whose rows are placed.
        large: packing in whose rows.
        side: (height, width) of a tile in the small one.
        full: (height, width) of a tile in the large one.

    Returns:
        (P_small,) int64, ascending; -1: not placed.
    """
    y, x = np.divmod(small.column, side[1])
    within = (y + 0.5) * full[0] // side[0] * full[1] + (x + 0.5) * full[1] // side[1]
    target = np.where(small.base, within, -1).astype(np.int64)
    first = int(large.base.sum())
    if (
        not small.size[0] or not large.size[0]
    ):  # only a base, or a sliver that is all padding: newlines are all there is
        ends, places = np.flatnonzero(small.newline), np.flatnonzero(large.newline)
        most = min(len(ends), len(places))
        target[ends[:most]] = places[:most]
        return target
    down, across = (_places(*lengths) for lengths in zip(small.size, large.size, strict=True))
    rest = ~small.base
    line = down[small.line]
    column = np.where(small.newline, large.size[1], across[np.minimum(small.column, small.size[1] - 1)])
    width = large.size[1] + bool(large.newline.any())
    target[rest] = np.where((line < 0) | (column < 0), -1, first + line * width + column)[rest]
    return target


def _places(few: int, many: int) -> np.ndarray:
    """(few,) int64 place among ``many`` of each of ``few`` lines; -1: left out, because there are more of them."""
    if few <= many:
        return ((np.arange(few) + 0.5) * many // few).astype(np.int64)
    places = np.full(few, -1, np.int64)
    places[((np.arange(many) + 0.5) * few // many).astype(np.int64)] = np.arange(many)
    return places
