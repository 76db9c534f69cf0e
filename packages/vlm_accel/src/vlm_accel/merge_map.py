"""Which source patch ended in which token (iLLaVA 4.3). NumPy only: maps are for looking at, not for computing.

A map belongs to one segment (an image with its tiles, a temporal slice of a video). Its steps are chained: the output
rows of one are the input rows of the next. The first step's input rows are the patches (or cells) of the grid, tile
after tile, each in raster order.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from polymodal.errors import UserError
from polymodal.files import atomic_write

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlm_accel.methods.base import Reduced

__all__ = ["CSR", "MergeMap", "MergeStep", "csr"]

_SCHEMA = 1
#: a file cannot make us allocate more than this
_MOST_PATCHES = 1 << 26


@dataclass(frozen=True)
class CSR:
    """A sparse matrix in compressed rows; row i has ``data[indptr[i]:indptr[i + 1]]`` at ``indices`` of that range.

    Args:
        indptr: int64 (rows + 1,). indices: int64 (entries,). data: float64 (entries,). columns: number of columns.
    """

    indptr: NDArray[Any]
    indices: NDArray[Any]
    data: NDArray[Any]
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return len(self.indptr) - 1, self.columns

    def rows(self) -> NDArray[Any]:
        """Row of each entry, int64 (entries,)."""
        return np.repeat(np.arange(self.shape[0]), np.diff(self.indptr))

    def dense(self) -> NDArray[Any]:
        """float64 (rows, columns)."""
        full = np.zeros(self.shape)
        np.add.at(full, (self.rows(), self.indices), self.data)
        return full

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        full = self.dense()
        return full if dtype is None else full.astype(dtype)

    def row_sums(self) -> NDArray[Any]:
        """float64 (rows,): 1 where the merges were means, 0 for rows that are no patches."""
        return np.bincount(self.rows(), weights=self.data, minlength=self.shape[0])

    def column_sums(self) -> NDArray[Any]:
        """float64 (columns,): how much of the output a source patch makes up."""
        return np.bincount(self.indices, weights=self.data, minlength=self.columns)

    def __matmul__(self, other: CSR) -> CSR:
        if self.columns != other.shape[0]:
            raise ValueError(f"cannot multiply {self.shape} by {other.shape}")
        counts = np.diff(other.indptr)[self.indices]
        rows = np.repeat(self.rows(), counts)
        # Within each repeated entry, walk along the row of ``other`` that it points to.
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        entries = np.repeat(other.indptr[self.indices], counts) + within
        data = np.repeat(self.data, counts) * other.data[entries]
        return _from_entries(rows, other.indices[entries], data, self.shape[0], other.columns)


def _from_entries(rows: Any, columns: Any, data: Any, height: int, width: int) -> CSR:
    """Sum entries of equal place and order them by row, then column."""
    places, inverse = np.unique(rows.astype(np.int64) * width + columns, return_inverse=True)
    summed = np.bincount(inverse.ravel(), weights=data, minlength=len(places))
    indptr = np.searchsorted(places // max(width, 1), np.arange(height + 1))
    return CSR(indptr.astype(np.int64), places % max(width, 1), summed, width)


def csr(dense: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(indptr int64, indices int32, data float32) of a dense (n_out, n_in) array or tensor on any device."""
    full = _numpy(dense)
    rows, columns = np.nonzero(full)
    indptr = np.searchsorted(rows, np.arange(full.shape[0] + 1)).astype(np.int64)
    return indptr, columns.astype(np.int32), full[rows, columns].astype(np.float32)


def _numpy(values: Any) -> NDArray[Any]:
    """An array of a tensor (any device; bfloat16 through float32) or of anything array-like."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values
        array: NDArray[Any] = values.numpy()
        return array
    return np.asarray(values)


@dataclass
class MergeStep:
    """One reduction of one segment's tokens.

    Args:
        stage: vision | features | splice | llm.
        layer: block or layer.
        n_in, n_out: rows before and after.
        kept: int32 (n_out,) input row of each output row; -1 for a row that is no patch (a newline).
        assign: int32 (n_in,) output row that each input row went to; -1: nowhere.
        weight: optional CSR triple (indptr, indices, data) of (n_out, n_in), rows of sum 1 where the rule is a mean;
            None: every output row is the input row in ``kept``.
        score: float32 (n_in,) or None.
    """

    stage: str
    layer: int
    n_in: int
    n_out: int
    kept: Any
    assign: Any
    weight: Any = None
    score: Any = None

    @classmethod
    def of(cls, stage: str, layer: int, reduced: Reduced, row: int = 0, score: Any = None) -> MergeStep:
        """The step of one sample of a batch.

        Args:
            stage: vision | features | splice | llm.
            layer: block or layer.
            reduced: what the method returned, with ``assign`` (copied to the CPU: for traces only).
            row: the sample.
            score: (n_in,) scores of that sample, or None.
        """
        if reduced.assign is None:
            raise ValueError("a traced step needs Reduced.assign; pass trace=True in Tokens")
        kept, assign = (_numpy(part[row]).astype(np.int32) for part in (reduced.kept, reduced.assign))
        return cls(
            stage, layer, len(assign), len(kept), kept, assign,
            None if reduced.weight is None else csr(reduced.weight[row]),
            None if score is None else _numpy(score).astype(np.float32),
        )  # fmt: skip

    def matrix(self) -> CSR:
        """(n_out, n_in) weights; one-hot rows at ``kept`` where the step has none."""
        if self.weight is not None:
            indptr, indices, data = (np.asarray(part) for part in self.weight)
            return CSR(indptr.astype(np.int64), indices.astype(np.int64), data.astype(np.float64), self.n_in)
        kept = np.asarray(self.kept, dtype=np.int64)
        real = kept >= 0
        return CSR(np.concatenate([[0], np.cumsum(real)]), kept[real], np.ones(int(real.sum())), self.n_in)


@dataclass
class MergeMap:
    """Steps of one segment.

    Methods that take ``step`` mean the state after ``steps[step]``; -1: after the last one.

    Args:
        grid: (tiles or slices, height, width) of the source patches (in the encoder's own patches, cells expanded).
        prefix: rows in front of the patches, not counted in ``grid``.
        group: patches per cell (rows of the steps are cells when group > 1); a square number.
        steps: in order.
    """

    grid: tuple[int, int, int]
    prefix: int = 0
    group: int = 1
    steps: list[MergeStep] = field(default_factory=list)

    @property
    def patches(self) -> int:
        """Source patches of the segment."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def rows(self) -> int:
        """Rows (patches, or cells where group > 1) before any step."""
        return self.patches // self.group

    def cell_of_patch(self) -> NDArray[Any]:
        """int64 (patches,): row of the first step's input that each patch, in raster order, belongs to."""
        tiles, height, width = self.grid
        side = round(self.group**0.5)
        if side * side != self.group or height % side or width % side:
            raise ValueError(f"a grid of {self.grid} has no cells of {self.group} patches")
        tile, row, column = np.indices((tiles, height, width))
        cell = (tile * (height // side) + row // side) * (width // side) + column // side
        flat: NDArray[Any] = cell.ravel().astype(np.int64)
        return flat

    def owner(self, step: int = -1) -> NDArray[Any]:
        """Row that each source patch ended in (-1: nowhere): int64 (patches,), tile after tile in raster order."""
        rows = np.arange(self.rows, dtype=np.int64)
        for one in self._until(step):
            rows = _follow(rows, np.asarray(one.assign, dtype=np.int64))
        placed: NDArray[Any] = rows[self.cell_of_patch()]
        return placed

    def positions(self, step: int = -1) -> NDArray[Any]:
        """Source row (patch, or cell where group > 1) at whose place each row stands, -1: no patch: int64 (n_out,)."""
        rows = np.arange(self.rows, dtype=np.int64)
        for one in self._until(step):
            kept = np.asarray(one.kept, dtype=np.int64)
            rows = _follow(kept, rows)
        return rows

    def survivors(self, step: int = -1) -> NDArray[Any]:
        """Patches whose own place is still in the sequence: bool (patches,), tile after tile in raster order."""
        alive = np.zeros(self.rows, dtype=bool)
        places = self.positions(step)
        alive[places[places >= 0]] = True
        placed: NDArray[Any] = alive[self.cell_of_patch()]
        return placed

    def source_weights(self, step: int = -1) -> CSR:
        """(n_out, patches) share of each source patch in each row: the product of the steps' matrices.

        Rows sum to 1 where all rules were means, and to 0 for rows that are no patches. A cell's weight is spread
        evenly over its patches.
        """
        product = CSR(np.arange(self.rows + 1), np.arange(self.rows), np.ones(self.rows), self.rows)
        for one in self._until(step):
            product = one.matrix() @ product
        if self.group == 1:
            return product
        patches = np.argsort(self.cell_of_patch(), kind="stable").reshape(self.rows, self.group)
        return CSR(
            product.indptr * self.group,
            patches[product.indices].ravel(),
            np.repeat(product.data / self.group, self.group),
            self.patches,
        )

    def sizes(self, step: int = -1) -> NDArray[Any]:
        """int64 (n_out,): source patches whose owner each row is."""
        chosen = self._until(step)
        owner = self.owner(step)
        return np.bincount(owner[owner >= 0], minlength=chosen[-1].n_out if chosen else self.rows)

    def _until(self, step: int) -> list[MergeStep]:
        """Steps up to ``step``, checked to be a chain."""
        last = step + len(self.steps) if step < 0 else step
        if not -1 <= last < len(self.steps):
            raise IndexError(f"step {step} of a map with {len(self.steps)} steps")
        rows, chosen = self.rows, self.steps[: last + 1]
        for number, one in enumerate(chosen):
            if one.n_in != rows:
                raise ValueError(f"step {number} ({one.stage} {one.layer}) takes {one.n_in} rows, but {rows} are there")
            rows = one.n_out
        return chosen

    def to_npz(self, path: str | Path) -> Path:
        """Write the map to a file that needs no code to be read; returns its path."""
        arrays: dict[str, Any] = {}
        heads = []
        for number, one in enumerate(self.steps):
            heads.append({"stage": one.stage, "layer": one.layer, "n_in": one.n_in, "n_out": one.n_out})
            parts = {"kept": one.kept, "assign": one.assign, "score": one.score}
            if one.weight is not None:
                parts |= dict(zip(("indptr", "indices", "data"), one.weight, strict=True))
            arrays |= {f"{number}_{name}": np.asarray(part) for name, part in parts.items() if part is not None}
        header = {
            "schema": _SCHEMA, "grid": self.grid, "prefix": self.prefix, "group": self.group, "steps": heads,
        }  # fmt: skip
        target = Path(path)
        atomic_write(target, lambda handle: np.savez_compressed(handle, header=np.array(json.dumps(header)), **arrays))
        return target

    @classmethod
    def from_npz(cls, path: str | Path) -> MergeMap:
        """Read a map that ``to_npz`` wrote.

        Raises:
            UserError: no such file, not such a file, a newer schema, or indices out of range.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls._read(arrays)
        except FileNotFoundError:
            raise UserError(f"no merge map at {path}; write one with MergeMap.to_npz") from None
        except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is no merge map ({error}); write one with MergeMap.to_npz") from None

    @classmethod
    def _read(cls, arrays: Any) -> MergeMap:
        header = json.loads(str(arrays["header"]))
        if header["schema"] > _SCHEMA:
            raise ValueError(f"schema {header['schema']} is newer than {_SCHEMA}; update vlm_accel")
        grid = tuple(int(size) for size in header["grid"])
        if len(grid) != 3 or min(grid) < 1 or grid[0] * grid[1] * grid[2] > _MOST_PATCHES:
            raise ValueError(f"grid {grid}")
        made = cls((grid[0], grid[1], grid[2]), int(header["prefix"]), int(header["group"]))
        for number, head in enumerate(header["steps"]):
            part = {
                name: arrays[f"{number}_{name}"] for name in _PARTS if f"{number}_{name}" in arrays.files
            }  # fmt: skip
            made.steps.append(_checked(head, part))
        made.owner()  # the chain fits, and so does the grid
        return made


_PARTS = ("kept", "assign", "score", "indptr", "indices", "data")


def _follow(rows: NDArray[Any], to: NDArray[Any]) -> NDArray[Any]:
    """``to[rows]``, with -1 staying -1."""
    if not len(to):
        return np.full(len(rows), -1, dtype=np.int64)
    return np.where(rows >= 0, to[rows], -1)


def _checked(head: dict[str, Any], part: dict[str, Any]) -> MergeStep:
    """A step read from a file, with every index in its range."""
    n_in, n_out = int(head["n_in"]), int(head["n_out"])
    weight = None
    if "indptr" in part:
        weight = part["indptr"], part["indices"], part["data"]
        ends = len(weight[0]) == n_out + 1 and weight[0][0] == 0 and weight[0][-1] == len(weight[1]) == len(weight[2])
        if not ends or (np.diff(weight[0]) < 0).any() or not _within(weight[1], 0, n_in):
            raise ValueError("weights out of range")
    if len(part["kept"]) != n_out or len(part["assign"]) != n_in:
        raise ValueError("kept or assign of a wrong length")
    if not _within(part["kept"], -1, n_in) or not _within(part["assign"], -1, n_out):
        raise ValueError("kept or assign out of range")
    return MergeStep(
        str(head["stage"]), int(head["layer"]), n_in, n_out, part["kept"], part["assign"], weight, part.get("score")
    )


def _within(values: NDArray[Any], low: int, high: int) -> bool:
    return bool(values.size == 0 or (values.min() >= low and values.max() < high))
