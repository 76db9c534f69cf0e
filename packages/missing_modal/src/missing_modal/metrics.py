"""Scores of a classifier, over all samples and by pattern of present modalities.

Everything is first computed a sample (``score_samples``), then averaged (``summarise``), so that the evaluation matrix
can look up a sample's scores instead of computing them anew. Numbers lie in 0..1 except ``nll`` and ``brier``.
Computed in float64; arrays of NumPy and tensors of torch are accepted alike, torch is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from polymodal.errors import UserError

from missing_modal.patterns import IMAGE_TEXT, all_masks, mask_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from missing_modal.data.base import Task

__all__ = [
    "Scores",
    "as_array",
    "auroc",
    "by_pattern",
    "f1_scores",
    "log_softmax",
    "mean_by_row",
    "probabilities",
    "report",
    "score_samples",
    "summarise",
]

_BINS = 15


def as_array(values: Any) -> NDArray[Any]:
    """``values`` as an array, a tensor from whatever device it lies on (bfloat16 as float32)."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values
    return np.asarray(values)


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms of the softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def probabilities(logits: Any, task: Task) -> NDArray[np.float64]:
    """(N, C) logits -> (N, C) probabilities: sigmoid for several labels, softmax else."""
    z = as_array(logits).astype(np.float64)
    if task == "multilabel":
        return cast("NDArray[np.float64]", np.exp(-np.logaddexp(0.0, -z)))
    return np.exp(log_softmax(z))


@dataclass(frozen=True)
class Scores:
    """What each of N samples brings to every metric.

    Args:
        task: multiclass, multilabel, binary.
        truth: (N,) class numbers, or (N, C) bool.
        predicted: the same shape: arg max, or probability >= 0.5.
        nll: (N,) -log of the true class's probability, or the mean over outputs of BCE-with-logits.
        brier: (N,) sum over classes of (p - y)^2, or the mean over outputs.
        confidence: (N,) largest probability, or (N, C) max(p, 1 - p).
        bins: same shape: number 0..14 of the confidence's bin (low, high] of equal width.
        rank: (N,) binary: logit of class 1 minus logit of class 0, which orders as the softmax of class 1 does but has
            no ties where the softmax rounds to 1; empty else.
    """

    task: Task
    truth: NDArray[Any]
    predicted: NDArray[Any]
    nll: NDArray[np.float64]
    brier: NDArray[np.float64]
    confidence: NDArray[np.float64]
    bins: NDArray[np.int64]
    rank: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.nll)

    def take(self, index: Any) -> Scores:
        """Scores of the samples that ``index`` (numbers or booleans) picks."""
        return Scores(
            self.task,
            truth=self.truth[index],
            predicted=self.predicted[index],
            nll=self.nll[index],
            brier=self.brier[index],
            confidence=self.confidence[index],
            bins=self.bins[index],
            rank=self.rank[index] if self.task == "binary" else self.rank,
        )


def _check(z: NDArray[np.float64], y: NDArray[Any], task: Task) -> None:
    wanted = z.shape if task == "multilabel" else z.shape[:1]
    if z.ndim != 2 or y.shape != wanted:
        raise ValueError(
            f"logits {z.shape}, labels {y.shape}; expected (N, C) and {'(N, C)' if len(wanted) > 1 else '(N,)'}"
        )
    if task == "binary" and z.shape[1] != 2:
        raise ValueError(f"logits {z.shape}; a binary task has two outputs")
    if not np.isfinite(z).all():
        raise UserError("logits are not finite; the model has diverged: lower the learning rate")
    bound = 2 if task == "multilabel" else z.shape[1]
    if y.size and not ((y >= 0) & (y < bound)).all():
        raise ValueError(f"labels {y.min()}..{y.max()}; expected 0..{bound - 1}")


def score_samples(logits: Any, labels: Any, task: Task) -> Scores:
    """Scores of each sample.

    Args:
        logits: (N, C), finite.
        labels: (N,) class numbers 0..C-1, or (N, C) of 0/1 for several labels.
        task: multiclass, multilabel, binary (C = 2).

    Raises:
        ValueError: shapes or labels that do not fit.
        UserError: logits that are not finite.
    """
    z = as_array(logits).astype(np.float64)
    y = as_array(labels)
    _check(z, y, task)
    if task == "multilabel":
        truth = y.astype(bool)
        nll = (np.logaddexp(0.0, z) - np.where(truth, z, 0.0)).mean(axis=1)
        p = probabilities(z, task)
        brier = ((p - truth) ** 2).mean(axis=1)
        # z >= 0 is p >= 0.5 without rounding: no temperature can change a prediction.
        predicted: NDArray[Any] = z >= 0
        confidence = np.maximum(p, 1.0 - p)
        rank = np.empty(0)
    else:
        truth = y.astype(np.int64)
        logs = log_softmax(z)
        at = np.arange(len(z))
        nll = -logs[at, truth]
        p = np.exp(logs)
        brier = (p**2).sum(axis=1) - 2.0 * p[at, truth] + 1.0
        predicted = z.argmax(axis=1)
        confidence = p[at, predicted]
        rank = z[:, 1] - z[:, 0] if task == "binary" else np.empty(0)
    bins = np.clip(np.ceil(confidence * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
    return Scores(task, truth, predicted, nll, brier, confidence, bins, rank)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else float("nan")


def _f1(hits: NDArray[np.int64], found: NDArray[np.int64], true: NDArray[np.int64]) -> NDArray[np.float64]:
    """2 TP / (predicted + true), nan where both are 0."""
    total = found + true
    result = np.full(total.shape, np.nan)
    np.divide(2.0 * hits, total, out=result, where=total > 0)
    return result


def f1_scores(truth: Any, predicted: Any) -> dict[str, float]:
    """F1 of several labels a sample.

    Args:
        truth: (N, C) bool or 0/1.
        predicted: (N, C) bool or 0/1.

    Returns:
        ``macro``: mean of the classes' F1, a class with no positive label and no prediction left out; ``micro``: of all
        pairs; ``samples``: mean of the samples' F1, a sample with neither left out by the same rule (the specification
        is silent); ``weighted``: by positive labels of the class. nan where nothing is left.

    Source:
        DCP (arXiv 2410.06558), our specification 4.4.
    """
    y, p = as_array(truth).astype(bool), as_array(predicted).astype(bool)
    both = y & p
    hits, found, true = (a.sum(axis=0, dtype=np.int64) for a in (both, p, y))
    by_class = _f1(hits, found, true)
    by_sample = _f1(*(a.sum(axis=1, dtype=np.int64) for a in (both, p, y)))
    support = int(true.sum())
    micro = _f1(hits.sum(keepdims=True), found.sum(keepdims=True), true.sum(keepdims=True))
    weighted = float(np.nansum(by_class * true)) / support if support else float("nan")
    return {
        "macro": _mean(by_class[~np.isnan(by_class)]),
        "micro": float(micro[0]),
        "samples": _mean(by_sample[~np.isnan(by_sample)]),
        "weighted": weighted,
    }


def auroc(truth: Any, score: Any) -> float:
    """Share of (positive, negative) pairs in the right order, ties count 1/2; nan without one of the two.

    Args:
        truth: (N,) 0/1.
        score: (N,) any numbers, larger for class 1.
    """
    y, s = as_array(truth).astype(bool), as_array(score).astype(np.float64)
    positives = int(y.sum())
    negatives = len(y) - positives
    if not positives or not negatives:
        return float("nan")
    _, place, counts = np.unique(s, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    rank = (ends - (counts - 1) / 2.0)[place]
    return float((rank[y].sum() - positives * (positives + 1) / 2.0) / (positives * negatives))


def _ece(scores: Scores) -> float:
    """Expected calibration error: sum over bins of |sum of confidences - number of hits|, by the number of entries."""
    if not scores.bins.size:
        return float("nan")
    hits = (scores.truth == scores.predicted).ravel().astype(np.float64)
    gap = np.bincount(scores.bins.ravel(), weights=scores.confidence.ravel() - hits, minlength=_BINS)
    return float(np.abs(gap).sum() / hits.size)


def summarise(scores: Scores) -> dict[str, float]:
    """Metrics of a set of samples.

    Returns:
        ``nll``, ``brier``, ``ece`` (15 bins of equal width on the largest probability; with several labels each output
        is a decision of its own), and by task ``accuracy`` (multiclass), ``accuracy`` and ``auroc`` (binary),
        ``f1_macro``, ``f1_micro``, ``f1_samples``, ``f1_weighted`` (multilabel). nan where a metric is not defined for
        these samples.

    Source:
        DCP (arXiv 2410.06558), our specification 4.4.
    """
    found: dict[str, float] = {}
    if scores.task == "multilabel":
        found |= {f"f1_{name}": value for name, value in f1_scores(scores.truth, scores.predicted).items()}
    else:
        found["accuracy"] = _mean((scores.truth == scores.predicted).astype(np.float64))
        if scores.task == "binary":
            found["auroc"] = auroc(scores.truth, scores.rank)
    return {**found, "nll": _mean(scores.nll), "brier": _mean(scores.brier), "ece": _ece(scores)}


def by_pattern(
    scores: Scores, masks: Any, modalities: Sequence[str] = IMAGE_TEXT, prefix: str = "test/"
) -> dict[str, float]:
    """Metrics of all samples, and the same by pattern.

    Args:
        scores: of N samples.
        masks: (N,) patterns as bit masks.
        modalities: in the order of the model.
        prefix: of the names.

    Returns:
        ``test/accuracy`` over all samples (nan where not defined), then ``test/accuracy/complete``,
        ``test/accuracy/image``, ... for the patterns that occur, where defined.
    """
    found = {f"{prefix}{name}": value for name, value in summarise(scores).items()}
    held = as_array(masks)
    for mask in all_masks(modalities):
        chosen = held == mask
        if not chosen.any():
            continue
        part = summarise(scores.take(chosen))
        suffix = mask_name(mask, modalities)
        found |= {f"{prefix}{name}/{suffix}": value for name, value in part.items() if not np.isnan(value)}
    return found


def report(
    logits: Any, labels: Any, masks: Any, task: Task, modalities: Sequence[str] = IMAGE_TEXT, prefix: str = "test/"
) -> dict[str, float]:
    """All metrics of a test, overall and by pattern.

    Args:
        logits: (N, C).
        labels: (N,) class numbers, or (N, C) of 0/1 for several labels.
        masks: (N,) patterns as bit masks.
        task: multiclass, multilabel, binary.
        modalities: in the order of the model.
        prefix: of the names.

    Returns:
        By name, see ``by_pattern`` and ``summarise``.

    Raises:
        ValueError: shapes or labels that do not fit.
        UserError: logits that are not finite.
    """
    return by_pattern(score_samples(logits, labels, task), masks, modalities, prefix)


def mean_by_row(logits: Any, rows: Iterable[str], task: Task) -> tuple[list[str], NDArray[np.float64]]:
    """Average the probabilities of the samples of a row (several plots of a film), given back as logits.

    Args:
        logits: (N, C) of the samples.
        rows: N row ids.
        task: multiclass, multilabel, binary.

    Returns:
        R row ids in the order of their first sample, and (R, C) logits whose probabilities are the means (log p, or
        log p - log(1 - p)); exact where probabilities round to 0 or 1. A row of one sample keeps its logits up to a
        constant of the sample (softmax).

    Source:
        DCP (arXiv 2410.06558), our specification 3.6, option ``plots="mean"``.
    """
    z = as_array(logits).astype(np.float64)
    names: dict[str, int] = {}
    place = np.array([names.setdefault(row, len(names)) for row in rows], dtype=np.int64)
    if z.shape[:1] != place.shape:
        raise ValueError(f"logits {z.shape} for {len(place)} rows; expected one line each")

    def logsumexp(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.full((len(names), z.shape[1]), -np.inf)
        np.logaddexp.at(total, place, logs)
        return total

    if task == "multilabel":
        return list(names), logsumexp(-np.logaddexp(0.0, -z)) - logsumexp(-np.logaddexp(0.0, z))
    counts = np.bincount(place, minlength=len(names))[:, None]
    return list(names), logsumexp(log_softmax(z)) - np.log(counts)
