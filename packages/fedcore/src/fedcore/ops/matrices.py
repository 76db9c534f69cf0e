"""Which tensors of a flat parameter vector are orthogonalised, as which matrices, and all of one shape at once.

Class M is orthogonalised, class A is the rest. The momentum of class M has two layouts: ``(..., P_M)``, its tensors one
after the other, as it travels and is stored; and ``(..., S)``, a few long segments of the flat vector that also span
small tensors of class A in between, so that a local step takes one operation a segment and not one a tensor.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from fedcore.spec import ParamInfo, ParamSpec

__all__ = [
    "FEW",
    "ConvScale",
    "Matrix",
    "MatrixLayout",
    "MuonParams",
    "add_product_",
    "gather",
    "matrix_layout",
    "pieces",
    "scatter_",
    "spans_of",
]

log = logging.getLogger(__name__)

MuonParams = Literal["all2d", "hidden"]
ConvScale = Literal["flattened", "official", "none"]
Span = tuple[int, int]
Factorize = Callable[[Tensor], tuple[Tensor, Tensor]]

HIDDEN = ("linear", "conv", "query", "key", "value", "qkv", "lora_a", "lora_b")
"""Kinds of hidden layers. The first layer of a transformer for images is a convolution by type but an embedding."""
SWALLOWED = 1 / 16
"""A gap between two tensors of class M is bridged where it is shorter than this share of what it joins."""
FEW = 8
"""Up to so many spans, one operation a span costs less than copies in and out of long segments."""


@dataclass(frozen=True)
class Matrix:
    """A tensor of class M as matrices.

    Args:
        info: the tensor.
        batch: independent matrices in it.
        rows: of one.
        cols: of one.
    """

    info: ParamInfo
    batch: int
    rows: int
    cols: int

    @property
    def size(self) -> Span:
        """(rows, cols) with the smaller one first."""
        return min(self.rows, self.cols), max(self.rows, self.cols)

    def view(self, flat: Tensor) -> Tensor:
        """The matrices (..., batch, m, n) with m <= n, as a view of a flat vector (..., P)."""
        part = flat[..., self.info.start : self.info.stop].view(*flat.shape[:-1], self.batch, self.rows, self.cols)
        return part.mT if self.rows > self.cols else part

    def scale(self, conv_scale: ConvScale) -> float:
        """``c = sqrt(max(1, rows / cols))`` of the matrix, or of the last two dimensions of the tensor (official)."""
        if conv_scale == "none":
            return 1.0
        rows, cols = (self.rows, self.cols) if conv_scale == "flattened" else self.info.shape[-2:]
        return math.sqrt(max(1.0, rows / cols))


@dataclass(frozen=True)
class MatrixLayout:
    """Classes and places of all tensors.

    Args:
        groups: matrices of one (rows, cols), the smaller one first, in the order of the flat vector.
        matrices: spans of class M; neighbours are joined.
        rest: spans of class A; neighbours are joined.
        segments: spans of the momentum while it is at work: those of class M with small gaps bridged.
        places: where the spans of class M lie in the concatenation of the segments.
        gaps: what else is in there.
    """

    groups: tuple[tuple[Matrix, ...], ...]
    matrices: tuple[Span, ...]
    rest: tuple[Span, ...]
    segments: tuple[Span, ...]
    places: tuple[Span, ...]
    gaps: tuple[Span, ...]

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(matrices, rows, cols) of every tensor of class M, in the order of the flat vector."""
        tensors = sorted((matrix for group in self.groups for matrix in group), key=lambda matrix: matrix.info.start)
        return [(matrix.batch, matrix.rows, matrix.cols) for matrix in tensors]

    @property
    def num_matrix(self) -> int:
        """P_M, elements of class M."""
        return _length(self.matrices)

    @property
    def num_rest(self) -> int:
        """P_A, elements of class A."""
        return _length(self.rest)

    @property
    def num_segment(self) -> int:
        """S, length of the momentum at work."""
        return _length(self.segments)

    def to_wire(self, work: Tensor) -> Tensor:
        """Momentum (..., S) at work -> (..., P_M) as it travels; itself where there are no gaps."""
        return work if self.matrices == self.segments else gather(work, self.places)

    def factors(self, flat: Tensor, function: Factorize) -> Iterator[tuple[Matrix, Tensor, Tensor]]:
        """Orthogonalise all matrices of a flat vector, those of one shape in one call for all tensors and clients.

        Args:
            flat: (..., P); may be overwritten by ``function``.
            function: (..., n, m, n') -> factors (..., n, m, m) and (..., n, m, n') of the result.

        Yields:
            Every matrix with its factors (..., batch, m, m) and (..., batch, m, n'), oriented as ``Matrix.view``.
        """
        for group in self.groups:
            views = [matrix.view(flat) for matrix in group]
            left, right = function(torch.cat(views, dim=-3) if len(views) > 1 else views[0])
            sizes = [matrix.batch for matrix in group]
            yield from zip(group, torch.split(left, sizes, dim=-3), torch.split(right, sizes, dim=-3), strict=True)


def matrix_layout(spec: ParamSpec, muon_params: MuonParams = "all2d") -> MatrixLayout:
    """Classes of all tensors; logs them when a layout is met for the first time.

    Args:
        spec: layout of the model.
        muon_params: ``all2d``: class M is every tensor with two or more dimensions, as in the authors' script;
            ``hidden``: only weights of hidden linear and convolution layers and of adapters, as Muon's author advises.

    Raises:
        ValueError: an unknown ``muon_params``.

    Source: arXiv 2510.27403, 3.2: 2-D as it is; 3-D (b, m, n) as b matrices; 4-D (o, i, kh, kw) as o x (i kh kw) and
    5-D alike.
    """
    if muon_params not in get_args(MuonParams):
        raise ValueError(f"muon_params={muon_params!r}; expected one of {', '.join(get_args(MuonParams))}")
    return _layout(spec, muon_params)


@lru_cache(maxsize=32)
def _layout(spec: ParamSpec, muon_params: MuonParams) -> MatrixLayout:
    groups: dict[Span, list[Matrix]] = {}
    spans: dict[bool, list[Span]] = {True: [], False: []}
    for info in spec:
        chosen = _is_matrix(info, muon_params)
        log.debug("%s %s: %s", info.name, info.shape, "orthogonalised" if chosen else "AdamW")
        _append(spans[chosen], (info.start, info.stop))
        if chosen:
            matrix = _matrix(info)
            groups.setdefault(matrix.size, []).append(matrix)
    count = sum(map(len, groups.values()))
    log.info("%d tensors orthogonalised in %d shapes, %d by AdamW", count, len(groups), len(spec) - count)
    matrices, rest = tuple(spans[True]), tuple(spans[False])
    segments = _bridged(matrices)
    places = [(at, at + high - low) for span in matrices for low, high, at in pieces(segments, *span)]
    gaps = [(at, at + high - low) for span in rest for low, high, at in pieces(segments, *span)]
    return MatrixLayout(tuple(map(tuple, groups.values())), matrices, rest, segments, tuple(places), tuple(gaps))


def _is_matrix(info: ParamInfo, muon_params: MuonParams) -> bool:
    if len(info.shape) < 2 or not info.numel:
        return False
    return muon_params == "all2d" or (info.kind in HIDDEN and not re.search(r"patch_?embed", info.name))


def _matrix(info: ParamInfo) -> Matrix:
    """The tensor as matrices; a leading dimension of 3-D tensors counts matrices."""
    shape = info.shape
    if len(shape) == 3:
        return Matrix(info, *shape)
    return Matrix(info, 1, shape[0], math.prod(shape[1:]))


def _bridged(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """Spans with the small gaps between them closed; a few spans stay as they are, which saves a copy a client."""
    if len(spans) <= FEW:
        return spans
    found: list[Span] = []
    for start, stop in spans:
        if found and start - found[-1][1] <= SWALLOWED * (found[-1][1] - found[-1][0] + stop - start):
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def _append(spans: list[Span], span: Span) -> None:
    """Add a span, joined to the last one where they touch."""
    if spans and spans[-1][1] == span[0]:
        spans[-1] = (spans[-1][0], span[1])
    else:
        spans.append(span)


def _length(spans: tuple[Span, ...]) -> int:
    return sum(stop - start for start, stop in spans)


def spans_of(spans: tuple[Span, ...]) -> list[Span]:
    """Where each span lies in the concatenation of all."""
    places, at = [], 0
    for start, stop in spans:
        places.append((at, at + stop - start))
        at += stop - start
    return places


def pieces(spans: tuple[Span, ...], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Parts of ``[start, stop)`` that lie in ``spans``: (first, one past the last, place in their concatenation)."""
    for (low, high), (place, _) in zip(spans, spans_of(spans), strict=True):
        first, last = max(low, start), min(high, stop)
        if first < last:
            yield first, last, place + first - low


def add_product_(target: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float) -> None:
    """``target <- beta target + alpha left right``, in one operation where the number formats agree.

    Args:
        target: (..., batch, m, n), any strides.
        left: (..., batch, m, k).
        right: (..., batch, k, n).
        beta: share of the target that stays.
        alpha: factor of the product.
    """
    if left.dtype != target.dtype:
        torch.add((alpha * left) @ right, target, alpha=beta, out=target)
        return
    for i in range(target.shape[-3]):
        place, a, b = (x.select(-3, i) for x in (target, left, right))
        (place.baddbmm_ if place.ndim > 2 else place.addmm_)(a, b, beta=beta, alpha=alpha)


def gather(flat: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """Concatenation (..., sum of lengths) of spans of a vector (..., P); a copy."""
    if not spans:
        return flat[..., :0].clone()
    return torch.cat([flat[..., start:stop] for start, stop in spans], dim=-1)


def scatter_(flat: Tensor, spans: tuple[Span, ...], values: Tensor) -> None:
    """Write a concatenation (..., sum of lengths) back to its spans of ``flat`` (..., P)."""
    for (start, stop), (low, high) in zip(spans, spans_of(spans), strict=True):
        flat[..., start:stop] = values[..., low:high]
