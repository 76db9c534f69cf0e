"""Scores of a segmentation by classes learnt early and late: confusion matrix, IoU, report, forgetting.

Numbers are in percent. Channels are places in learning order, 0 is the background; pixels whose truth is 255 count
nowhere. Arrays of NumPy and tensors of torch are accepted alike; torch is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from css.task import BACKGROUND, IGNORE

__all__ = [
    "SparseConfusion",
    "add_sparse",
    "average_over_steps",
    "class_iou",
    "confusion_matrix",
    "forgetting",
    "mean_forgetting",
    "segmentation_report",
    "sparse_confusion",
]


class SparseConfusion(NamedTuple):
    """Confusion matrix of one picture: a few classes meet, so only the cells that are not zero are kept.

    Args:
        cells: (n,) int32, truth * channels + prediction, ascending.
        counts: (n,) int64 pixels.
        channels: S.
    """

    cells: NDArray[np.int32]
    counts: NDArray[np.int64]
    channels: int


def _array(values: Any) -> NDArray[Any]:
    """``values`` as an array, a tensor from whatever device it lies on."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values)


def _cells(labels: Any, predictions: Any, channels: int) -> NDArray[np.int64]:
    """Cell number (truth * channels + prediction) of each pixel that counts."""
    truth, found = _array(labels), _array(predictions)
    if truth.shape != found.shape:
        raise ValueError(f"labels {truth.shape} and predictions {found.shape}; expected the same shape")
    counted = truth != IGNORE
    truth, found = truth[counted], found[counted]
    for name, values in (("labels", truth), ("predictions", found)):
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < channels:
            raise ValueError(
                f"{name} are {values.min()}..{values.max()} where the truth is not {IGNORE}; expected 0..{channels - 1}"
            )
    cells: NDArray[np.int64] = truth.astype(np.int64) * channels + found.astype(np.int64)
    return cells


def confusion_matrix(labels: Any, predictions: Any, channels: int) -> NDArray[np.int64]:
    """Pixels by truth and prediction.

    Args:
        labels: integers of any shape, 0..channels-1, or 255 where a pixel does not count.
        predictions: integers of the same shape, 0..channels-1.
        channels: S, background included.

    Returns:
        (S, S) int64, rows are the truth.

    Raises:
        ValueError: shapes that differ, or a channel out of range.
    """
    cells = _cells(labels, predictions, channels)
    return np.bincount(cells, minlength=channels * channels).astype(np.int64).reshape(channels, channels)


def sparse_confusion(labels: Any, predictions: Any, channels: int) -> SparseConfusion:
    """``confusion_matrix`` of one picture as a small record, to be sent between processes and counted once a picture.

    Raises:
        ValueError: as ``confusion_matrix``.
    """
    matrix = confusion_matrix(labels, predictions, channels).ravel()
    cells = np.flatnonzero(matrix)
    return SparseConfusion(cells.astype(np.int32), matrix[cells], channels)


def add_sparse(confusion: NDArray[np.int64], record: SparseConfusion) -> NDArray[np.int64]:
    """Add a picture's record to a confusion matrix, in place.

    Args:
        confusion: (S, S) int64.
        record: of a picture, with the same S.

    Returns:
        ``confusion``.

    Raises:
        ValueError: a record of another number of channels.
    """
    if confusion.shape != (record.channels, record.channels):
        raise ValueError(f"record of {record.channels} channels for a confusion matrix {confusion.shape}")
    confusion[np.divmod(record.cells, record.channels)] += record.counts
    return confusion


def class_iou(confusion: Any) -> NDArray[np.float64]:
    """Intersection over union of each channel: TP / (row + column - TP).

    Args:
        confusion: (S, S) pixels, rows are the truth.

    Returns:
        (S,) percent; 0 where a class occurs in neither truth nor prediction.

    Raises:
        ValueError: not a square matrix.

    Source:
        EIR (arXiv 2503.22136), our reading, section 4.3.
    """
    matrix = _array(confusion).astype(np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"confusion matrix {matrix.shape}; expected (S, S)")
    hits = np.diagonal(matrix)
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - hits
    result: NDArray[np.float64] = 100.0 * hits / np.maximum(union, 1.0)
    return result


def _channels(classes: int | Iterable[int], start: int) -> list[int]:
    """A count as the next channels from ``start``; an iterable of channels as it is."""
    if isinstance(classes, (int, np.integer)):
        return list(range(start, start + int(classes)))
    return [int(channel) for channel in classes]


def segmentation_report(
    confusion: Any, base_classes: int | Iterable[int], later_classes: int | Iterable[int]
) -> dict[str, Any]:
    """Mean IoU of the classes learnt first, of those learnt later, and of all.

    Args:
        confusion: (S, S) pixels, rows are the truth, row 0 is the background.
        base_classes: channels of step 0; a count n means 1..n.
        later_classes: channels of all later steps; a count n means the next n channels.

    Returns:
        In percent: ``old``, the mean over the background and the base classes; ``new``, the mean over the later
        classes (nan where there is none); ``all``, the mean over the background and all these classes; ``harmonic``,
        the harmonic mean of old and new (nan without new); ``classes``, the IoU of every channel, a list. Classes that
        occur nowhere count as 0.

    Raises:
        ValueError: channels twice, or outside 1..S-1.

    Source:
        EIR (arXiv 2503.22136), our reading, section 4.3.
    """
    iou = class_iou(confusion)
    base = _channels(base_classes, 1)
    later = _channels(later_classes, max(base, default=BACKGROUND) + 1)
    seen = [BACKGROUND, *base, *later]
    if len(set(seen)) != len(seen) or not all(0 <= channel < len(iou) for channel in seen):
        raise ValueError(
            f"base classes {base} and later classes {later}; expected different channels in 1..{len(iou) - 1}"
        )
    old = float(iou[[BACKGROUND, *base]].mean())
    new = float(iou[later].mean()) if later else float("nan")
    product = 2.0 * old * new
    harmonic = product / (old + new) if product else product
    return {"old": old, "new": new, "all": float(iou[seen].mean()), "harmonic": harmonic, "classes": iou.tolist()}


def forgetting(history: Sequence[Any]) -> NDArray[np.float64]:
    """How much of its best earlier IoU each class has lost at the end; negative where it got better.

    Args:
        history: IoU of each step in percent, (S_t,) with S_t growing by step: ``classes`` of the reports.

    Returns:
        (S,) with S channels of the last step but one, index 0 is the background; empty for a single step.

    Raises:
        ValueError: no step, or a step with fewer channels than the one before.

    Source:
        EIR (arXiv 2503.22136), our reading, section 4.3.
    """
    steps = [_array(step).astype(np.float64) for step in history]
    sizes = [len(step) for step in steps]
    if not steps or sizes != sorted(sizes):
        raise ValueError(f"steps with {sizes} channels; expected at least one step, and no fewer channels than before")
    earlier, final = steps[:-1], steps[-1]
    if not earlier:
        return np.zeros(0)
    best = np.full(len(earlier[-1]), -np.inf)
    for step in earlier:
        best[: len(step)] = np.maximum(best[: len(step)], step)
    result: NDArray[np.float64] = best - final[: len(best)]
    return result


def mean_forgetting(history: Sequence[Any]) -> float:
    """Mean of ``forgetting`` over the classes of earlier steps, without the background; 0 for a single step.

    Raises:
        ValueError: as ``forgetting``.
    """
    lost = forgetting(history)[1:]
    return float(lost.mean()) if lost.size else 0.0


def average_over_steps(reports: Sequence[float | Mapping[str, Any]]) -> float:
    """Mean over the steps of ``all`` at that step (``avg`` of the literature).

    Args:
        reports: a report of ``segmentation_report`` for each step, or its ``all``.

    Raises:
        ValueError: no step.

    Source:
        PLOP (arXiv 2011.11390); EIR, our reading, section 4.3.
    """
    if not reports:
        raise ValueError("no step to average over; expected at least one report")
    return float(np.mean([report["all"] if isinstance(report, Mapping) else report for report in reports]))
