"""Merge maps of encoder calls (iLLaVA 4.3), written with a trace only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlm_accel.merge_map import MergeMap, MergeStep

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.encoders.surgery import BatchedCall
    from vlm_accel.methods.base import Reduced

__all__ = ["joined_step", "maps_of"]


def joined_step(stage: str, layer: int, parts: list[tuple[Tensor, Reduced]]) -> MergeStep:
    """One step of a segment whose images (tiles) lie behind one another.

    Args:
        stage: vision or features. layer: block.
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
            indptr.append(np.cumsum(np.bincount(at, minlength=m)) + indptr[-1][-1])
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
