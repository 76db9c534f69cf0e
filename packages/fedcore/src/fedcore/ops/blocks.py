"""Blocks of parameters whose second moments are replaced by their mean."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore.spec import ParamInfo, ParamSpec

__all__ = ["BlockRow", "Blocks", "Run", "hessian_blocks", "tensor_blocks"]

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """``blocks`` neighbouring blocks of ``length`` elements each, from index ``start`` of the flat vector."""

    start: int
    blocks: int
    length: int


class BlockRow(NamedTuple):
    """One line of the table: how a tensor is divided."""

    name: str
    shape: tuple[int, ...]
    kind: str
    rule: str
    blocks: int


@dataclass(frozen=True)
class Blocks:
    """A division of the flat vector into blocks, all of them contiguous.

    Means go run by run over views, which is several times quicker than a scatter over block numbers.

    Args:
        runs: the blocks, in the order of the vector.
        rows: one line a tensor.
    """

    runs: tuple[Run, ...]
    rows: tuple[BlockRow, ...]

    def __len__(self) -> int:
        return sum(run.blocks for run in self.runs)

    @cached_property
    def numel(self) -> int:
        """P, the length of the flat vector."""
        return sum(run.blocks * run.length for run in self.runs)

    @property
    def sizes(self) -> Tensor:
        """(blocks,) elements of each block, int64."""
        return torch.cat([torch.full((run.blocks,), run.length) for run in self.runs])

    @property
    def ids(self) -> Tensor:
        """(P,) number of the block that an element is in, int64."""
        return torch.arange(len(self)).repeat_interleave(self.sizes)

    def mean(self, flat: Tensor) -> Tensor:
        """Means (..., blocks) of a vector (..., P)."""
        return torch.cat([view.mean(dim=-1) for view in self._views(flat)], dim=-1)

    def expand(self, means: Tensor, like: Tensor | None = None) -> Tensor:
        """A new vector (..., P) that holds its block's mean (..., blocks) in each place.

        Args:
            means: one value a block.
            like: has the shape of the result, where ``means`` lacks leading dimensions.
        """
        out = means.new_empty((*means.shape[:-1], self.numel) if like is None else like.shape)
        for view, part in zip(self._views(out), means.split_with_sizes(self._counts, dim=-1), strict=True):
            view.copy_(part.unsqueeze(-1))
        return out

    def table(self) -> str:
        """Parameter, shape, kind, rule and number of blocks, as text in columns."""
        head = ("parameter", "shape", "kind", "one block per", "blocks")
        lines = [head, *((r.name, "x".join(map(str, r.shape)), r.kind, r.rule, str(r.blocks)) for r in self.rows)]
        lines.append(("total", str(self.numel), "", "", str(len(self))))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    @cached_property
    def _counts(self) -> list[int]:
        return [run.blocks for run in self.runs]

    @cached_property
    def _lengths(self) -> list[int]:
        return [run.blocks * run.length for run in self.runs]

    def _views(self, flat: Tensor) -> Iterator[Tensor]:
        """The runs as views (..., blocks, length)."""
        for run, part in zip(self.runs, flat.split_with_sizes(self._lengths, dim=-1), strict=True):
            yield part.view(*flat.shape[:-1], run.blocks, run.length)


def hessian_blocks(spec: ParamSpec) -> Blocks:
    """Blocks after the near-block-diagonal Hessian of Transformers.

    One per attention head for query and key weights (and LoRA B on them), one per row for value, output, linear and
    LoRA A weights, filter, token and class, one per position, one per tensor for everything 1-D and class tokens. Fused
    qkv weights with rows ordered q, k, v are divided like the three. Tensors of unknown use are divided by row, and
    logged.

    Source: fedadamw paper's "Hessian-informed partitioning" made concrete after Adam-mini (arXiv 2406.16793).
    """
    return _blocks(spec, _hessian)


def tensor_blocks(spec: ParamSpec) -> Blocks:
    """One block per tensor, as in the authors' script of July 2025."""
    return _blocks(spec, lambda item: ("tensor", (1,)))


Division = tuple[str, tuple[int, ...]]
"""Rule, and how many equal blocks there are in each equal part of the tensor."""


def _blocks(spec: ParamSpec, divide: Callable[[ParamInfo], Division]) -> Blocks:
    runs: list[Run] = []
    rows: list[BlockRow] = []
    for item in spec:
        rule, parts = divide(item)
        rows.append(BlockRow(item.name, item.shape, item.kind, rule, sum(parts)))
        part = item.numel // len(parts)
        for i, count in enumerate(parts):
            _append(runs, Run(item.start + i * part, count, part // count))
    unknown = [row.name for row in rows if row.rule.endswith("?")]
    if unknown:
        log.warning("use of %d tensors unknown, one block per row: %s", len(unknown), ", ".join(unknown))
    return Blocks(tuple(runs), tuple(rows))


def _append(runs: list[Run], run: Run) -> None:
    """Add a run, as part of the last one where the lengths are the same."""
    if runs and runs[-1].length == run.length:
        run = Run(runs[-1].start, runs[-1].blocks + run.blocks, run.length)
        runs.pop()
    runs.append(run)


def _hessian(item: ParamInfo) -> Division:
    kind = item.host if item.kind == "lora_b" else item.kind
    if item.kind == "token" or len(item.shape) < 2:
        return "tensor", (1,)
    rows = item.shape[0]
    if kind == "position":
        return ("position", (item.numel // item.shape[-1],)) if len(item.shape) <= 3 else ("row?", (rows,))
    if kind in ("query", "key") and item.heads and rows % item.heads == 0:
        return "head", (item.heads,)
    if kind == "qkv" and item.heads and rows % (3 * item.heads) == 0:
        return "head, head, row", (item.heads, item.heads, rows // 3)
    return ("row?" if kind in ("query", "key", "qkv", "other") else "row"), (rows,)
