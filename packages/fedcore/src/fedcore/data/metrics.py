"""Scores of predictions beside accuracy, as GLUE reports them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["METRICS", "accuracy", "f1", "matthews", "pearson", "spearman"]


def accuracy(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Share of right classes, 0..1."""
    return float(np.mean(predicted == targets))


def f1(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1, 0..1; 0 where there is neither."""
    right = int(np.sum((predicted == 1) & (targets == 1)))
    total = int(np.sum(predicted == 1) + np.sum(targets == 1))
    return 2 * right / total if total else 0.0


def matthews(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Correlation of two classes 0 and 1, -1..1; 0 where either never varies."""
    return pearson(predicted.astype(np.float64), targets.astype(np.float64))


def pearson(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Linear correlation, -1..1; 0 where either never varies."""
    a, b = (x.astype(np.float64) - x.mean(dtype=np.float64) for x in (predicted, targets))
    scale = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return float(np.sum(a * b)) / scale if scale else 0.0


def spearman(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Linear correlation of the ranks, -1..1; equal values share their mean rank."""
    return pearson(_ranks(predicted), _ranks(targets))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    mean: np.ndarray = ends - (count - 1) / 2
    return mean[place]


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
"""``metric(predicted (N,), targets (N,))``: class numbers, or numbers of a regression."""
