"""Merge maps of encoder calls (iLLaVA 4.3), written with a trace only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlm_accel.merge_map import MergeMap, MergeStep

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.encoders.surgery import BatchedCall
    from vlm_accel.methods.base import Reduced

__all__ = ["joined_step", "maps_of", "one_image", "splice", "vision_steps"]


def joined_step(stage: str, layer: int, parts: list[tuple[Tensor, Reduced]]) -> MergeStep:
    """One step of a segment whose images (tiles) lie behind one another.

    Args:
        stage: vision or features.
        layer: block.
        parts: for each image its scores (1, n) and what was left (S = 1); n and m may differ between images.
    """
    kept, assign, scores, indptr, indices, data = [], [], [], [np.zeros(1, np.int64)], [], []
    rows = left = 0
    for score, reduced in parts:
        n, m = score.shape[1], reduced.kept.shape[1]
        kept.append(_numpy(reduced.kept[0]).astype(np.int32) + rows)
        went = _assign(reduced, n)
        assign.append(np.where(went < 0, -1, went + left).astype(np.int32))
        scores.append(_numpy(score[0].float()))
        if reduced.weight is not None:
            weight = _numpy(reduced.weight[0].float())
            at, column = np.nonzero(weight)
            indices.append((column + rows).astype(np.int32))
            data.append(weight[at, column].astype(np.float32))
            # a tile of which nothing is left (HiRED) adds no row
            indptr.append(np.cumsum(np.bincount(at, minlength=m))[:m] + sum(map(len, data[:-1])))
        rows, left = rows + n, left + m
    weights = None
    if indices and len(indices) == len(parts):
        weights = (np.concatenate(indptr), np.concatenate(indices), np.concatenate(data))
    return MergeStep(
        stage, layer, rows, left, np.concatenate(kept), np.concatenate(assign), weights, np.concatenate(scores)
    )


def maps_of(call: BatchedCall, first: int = 0, images: int | None = None) -> list[MergeMap]:
    """One map per image of a call, vision steps only."""
    count = call.state.images if images is None else images
    assert call.state.grid is not None
    return [
        MergeMap((1, *call.state.grid), call.state.prefix, call.state.group, vision_steps(call, [image]))
        for image in range(first, first + count)
    ]


def vision_steps(call: BatchedCall, images: list[int]) -> list[MergeStep]:
    """The vision steps of a segment that consists of ``images`` of a call, in this order."""
    return [
        joined_step("vision", step.layer, [(scores[i : i + 1], one_image(reduced, i)) for i in images])
        for step, scores, reduced in call.state.taken
    ]


def splice(
    layer: int, alive: np.ndarray, source: np.ndarray, weight: np.ndarray, row_of: np.ndarray, n_in: int
) -> MergeStep:
    """From a segment's survivors to its placeholder rows that stay.

    Args:
        layer: block whose output the model reads.
        alive: (P,) bool, placeholder rows that stay.
        source: (P, k) int64 patches that each row shows.
        weight: (P, k) their shares, 0 where there is none.
        row_of: (patches,) int64 survivor that stands for each patch, -1: none.
        n_in: survivors.
    """
    out = np.flatnonzero(alive)
    rows, shares = row_of[source[out]], weight[out].astype(np.float64)
    shares = np.where(rows >= 0, shares, 0)
    best = shares.argmax(1)
    real = shares.max(1, initial=0) > 0
    kept = np.where(real, rows[np.arange(len(out)), best], -1).astype(np.int32)
    at, corner = np.nonzero(shares)
    entry_row, entry_share = rows[at, corner], shares[at, corner]
    assign = np.full(n_in, -1, np.int32)
    order = np.lexsort((-at, entry_share))  # ascending share, the first row last: it wins
    assign[entry_row[order]] = at[order]
    csr = None
    if source.shape[1] > 1:
        places, inverse = np.unique(at * max(n_in, 1) + entry_row, return_inverse=True)
        summed = np.bincount(inverse.ravel(), weights=entry_share)
        total = np.maximum(np.bincount(places // max(n_in, 1), weights=summed, minlength=len(out)), 1e-12)
        data = (summed / total[places // max(n_in, 1)]).astype(np.float32)
        indptr = np.searchsorted(places // max(n_in, 1), np.arange(len(out) + 1)).astype(np.int64)
        csr = (indptr, (places % max(n_in, 1)).astype(np.int32), data)
    return MergeStep("splice", layer, n_in, len(out), kept, assign, csr, None)


def one_image(reduced: Reduced, image: int) -> Reduced:
    """Row ``image`` of a batch, without its tokens."""
    from vlm_accel.methods.base import Reduced as Kind

    part = slice(image, image + 1)
    return Kind(
        x=reduced.x[part, :0],
        kept=reduced.kept[part],
        assign=None if reduced.assign is None else reduced.assign[part],
        weight=None if reduced.weight is None else reduced.weight[part],
    )


def _assign(reduced: Reduced, rows: int) -> np.ndarray:
    """Where each row went; methods that do not say: kept rows to themselves, the others nowhere."""
    if reduced.assign is not None:
        return _numpy(reduced.assign[0])
    kept = _numpy(reduced.kept[0])
    went = np.full(rows, -1, np.int64)
    went[kept] = np.arange(len(kept))
    return went


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
