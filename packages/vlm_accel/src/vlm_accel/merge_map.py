"""Which source patch ended in which token (iLLaVA 4.3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["MergeMap", "MergeStep"]


@dataclass
class MergeStep:
    """One reduction of one image's tokens.

    Args:
        stage: vision | features | splice | llm.
        layer: block or layer.
        n_in, n_out: rows before and after.
        kept: int32 (n_out,) input row of each output row; -1 for a row that is no patch (a newline).
        assign: int32 (n_in,) output row that each input row went to; -1: nowhere.
        weight: optional CSR (indptr, indices, data) of (n_out, n_in), row sums 1.
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


@dataclass
class MergeMap:
    """Steps of one segment.

    Args:
        grid: (tiles or slices, height, width) of the source patches (in the encoder's own patches, cells expanded).
        prefix: rows in front of the patches, not counted in ``grid``.
        group: patches per cell (rows of the steps are cells when group > 1).
        steps: in order.
    """

    grid: tuple[int, int, int]
    prefix: int = 0
    group: int = 1
    steps: list[MergeStep] = field(default_factory=list)
