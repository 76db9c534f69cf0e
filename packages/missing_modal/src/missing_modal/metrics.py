"""Scores of a classifier, over all samples and by pattern of present modalities.

Everything is first computed a sample (``score_samples``), then added up (``Addends``) and turned into metrics, so that
the evaluation matrix can look up a sample's part instead of computing it anew, and the sums over all samples are those
of the patterns. Numbers lie in 0..1 except ``nll`` and ``brier``.
Computed in float64; arrays of NumPy and tensors of torch are accepted alike, torch is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from polymodal.errors import UserError

from missing_modal.patterns import IMAGE_TEXT, all_masks, mask_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from missing_modal.data.base import Task

__all__ = [
    "Addends",
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


def _f1_parts(y: NDArray[np.bool_], p: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Of each sample: (N, 3C) hits, predictions and positive labels, and (N,) its own F1, nan where it has neither."""
    counts = np.concatenate([y & p, p, y], axis=1).astype(np.int32)
    by_sample = _f1(*(part.sum(axis=1, dtype=np.int64) for part in np.split(counts, 3, axis=1)))
    return counts, by_sample


def _f1_metrics(counts: NDArray[Any], by_sample: float, defined: float) -> dict[str, float]:
    """See ``f1_scores``, from sums over samples: (3C,) counts, sum of the samples' F1 and how many have one."""
    hits, found, true = np.split(counts.astype(np.int64), 3)
    by_class = _f1(hits, found, true)
    support = int(true.sum())
    micro = _f1(hits.sum(keepdims=True), found.sum(keepdims=True), true.sum(keepdims=True))
    weighted = float(np.nansum(by_class * true)) / support if support else float("nan")
    return {
        "macro": _mean(by_class[~np.isnan(by_class)]),
        "micro": float(micro[0]),
        "samples": by_sample / defined if defined else float("nan"),
        "weighted": weighted,
    }


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
    counts, by_sample = _f1_parts(as_array(truth).astype(bool), as_array(predicted).astype(bool))
    there = by_sample[~np.isnan(by_sample)]
    return _f1_metrics(counts.sum(axis=0, dtype=np.int64), float(there.sum()), len(there))


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
    _, place = np.unique(s, return_inverse=True)
    return _auroc(np.bincount(place[y], minlength=place.max() + 1), np.bincount(place[~y], minlength=place.max() + 1))


def _auroc(positives: NDArray[np.int64], negatives: NDArray[np.int64]) -> float:
    """See ``auroc``; how many of each there are at each distinct score, ascending. Half integers: sums are exact."""
    pairs = int(positives.sum()) * int(negatives.sum())
    below = np.cumsum(negatives) - negatives / 2.0
    return float((positives * below).sum() / pairs) if pairs else float("nan")


class Addends:
    """What each of N samples adds to the sums that all metrics are made of.

    Args:
        scores: of N samples.

    Attributes:
        task: of the scores.
        rows: (N, K) float64: NLL, Brier, hit (several labels: F1 of the sample, 0 where it has none), whether that is
            defined, then confidence minus hits in each of the 15 bins.
        counts: several labels: (N, 3C) hits, predictions and positive labels, else (N, 0).
        entries: decisions of a sample: C with several labels, else 1.
        places: binary: (N,) place of the rank among the distinct ranks, twice as fine: + 1 for class 1; else None.
    """

    def __init__(self, scores: Scores) -> None:
        count, several = len(scores), scores.task == "multilabel"
        self.task: Task = scores.task
        self.entries = scores.truth.shape[1] if several else 1
        right = (scores.truth == scores.predicted).astype(np.float64)
        if several:
            self.counts, first = _f1_parts(scores.truth, scores.predicted)
        else:
            self.counts, first = np.zeros((count, 0), dtype=np.int32), right
        at = (np.arange(count) * _BINS).repeat(self.entries) + scores.bins.ravel()
        gaps = np.bincount(at, weights=(scores.confidence - right).ravel(), minlength=count * _BINS)
        defined = ~np.isnan(first)
        columns = [scores.nll, scores.brier, np.where(defined, first, 0.0), defined]
        self.rows = np.concatenate([np.stack(columns, axis=1), gaps.reshape(count, _BINS)], axis=1)
        self.places: NDArray[np.int64] | None = None
        if self.task == "binary":
            _, place = np.unique(scores.rank, return_inverse=True)
            self.places = 2 * place + scores.truth
            self._distinct = int(place.max(initial=-1)) + 1

    def sums(self, lines: NDArray[np.int64] | slice) -> _Sums:
        """Sums over the samples of ``lines`` (numbers)."""
        rows = self.rows[lines]
        held = None if self.places is None else np.bincount(self.places[lines], minlength=2 * self._distinct)
        return _Sums(len(rows), rows.sum(axis=0), self.counts[lines].sum(axis=0, dtype=np.int32), held)

    def metrics(self, sums: _Sums) -> dict[str, float]:
        """See ``summarise``."""
        count = sums.count or float("nan")
        nll, brier, first, defined = (float(value) for value in sums.rows[:4])
        found: dict[str, float] = {}
        if self.task == "multilabel":
            found |= {f"f1_{name}": value for name, value in _f1_metrics(sums.counts, first, defined).items()}
        else:
            found["accuracy"] = first / count
            if sums.places is not None:
                found["auroc"] = _auroc(sums.places[1::2], sums.places[::2])
        ece = float(np.abs(sums.rows[4:]).sum()) / (count * self.entries)
        return {**found, "nll": nll / count, "brier": brier / count, "ece": ece}

    def by_group(self, groups: Mapping[str, NDArray[np.int64]], prefix: str) -> dict[str, float]:
        """Metrics of disjoint groups of samples, and before them those of all of these samples.

        Args:
            groups: name -> numbers of its samples, which may be none.
            prefix: of the metrics' names.

        Returns:
            See ``by_pattern``.
        """
        parts = {name: self.sums(lines) for name, lines in groups.items() if len(lines)}
        whole = self.sums(slice(0, 0))
        for part in parts.values():
            whole = whole.plus(part)
        found = {f"{prefix}{name}": value for name, value in self.metrics(whole).items()}
        for suffix, part in parts.items():
            values = self.metrics(part)
            found |= {f"{prefix}{name}/{suffix}": value for name, value in values.items() if not math.isnan(value)}
        return found


@dataclass(frozen=True)
class _Sums:
    """Of ``count`` samples: see ``Addends``; ``places``: how many samples there are at each place."""

    count: int
    rows: NDArray[np.float64]
    counts: NDArray[np.int32]
    places: NDArray[np.int64] | None

    def plus(self, other: _Sums) -> _Sums:
        """Sums over both."""
        places = None if self.places is None or other.places is None else self.places + other.places
        return _Sums(self.count + other.count, self.rows + other.rows, self.counts + other.counts, places)


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
    addends = Addends(scores)
    return addends.metrics(addends.sums(slice(None)))


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
    held = as_array(masks)
    groups = {mask_name(mask, modalities): np.flatnonzero(held == mask) for mask in all_masks(modalities)}
    return Addends(scores).by_group(groups, prefix)


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
