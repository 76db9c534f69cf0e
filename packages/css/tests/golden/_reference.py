"""Slow, independent float64 versions of the formulas: one pixel at a time, in probabilities rather than logarithms.

Nothing here imports the package under test or torch.
"""

import math

import numpy as np


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def softmax(row):
    e = np.exp(np.asarray(row, dtype=np.float64) - np.max(row))
    return e / e.sum()


def pixels(shape):
    """Batch, row, column of every pixel of (B, S, H, W)."""
    batch, _, height, width = shape
    return [(b, i, j) for b in range(batch) for i in range(height) for j in range(width)]


def pseudo_label(labels, old_logits, threshold):
    out = labels.copy()
    for b, i, j in pixels(old_logits.shape):
        scores = [sigmoid(x) for x in old_logits[b, :, i, j]]
        best = max(range(len(scores)), key=scores.__getitem__)
        if labels[b, i, j] == 0 and best > 0 and scores[best] >= threshold:
            out[b, i, j] = best
    return out


def one_hot(labels, channels):
    batch, height, width = labels.shape
    out = np.zeros((batch, channels, height, width))
    for b, i, j in pixels(out.shape):
        if labels[b, i, j] != 255:
            out[b, labels[b, i, j], i, j] = 1.0
    return out


def soft_binary_loss(logits, target):
    total, count = 0.0, 0
    for b, i, j in pixels(logits.shape):
        row = target[b, :, i, j]
        if row.sum() == 0:
            continue
        count += 1
        for z, t in zip(logits[b, :, i, j], row, strict=True):
            total -= t * math.log(sigmoid(z)) + (1.0 - t) * math.log(sigmoid(-z))
    return total / max(count, 1)


def region_distillation(new_logits, old_logits, labels, variant):
    old_channels, channels = old_logits.shape[1], new_logits.shape[1]
    total, where = 0.0, pixels(new_logits.shape)
    for b, i, j in where:
        p, q = softmax(old_logits[b, :, i, j]), softmax(new_logits[b, :, i, j])
        inside = labels[b, i, j] != 255 and labels[b, i, j] >= old_channels
        new = list(range(old_channels, channels))
        if variant == "new_only" and not inside:
            continue
        stands_for = [0, *new] if variant == "mib" else new if inside else [0]
        loss = p[0] * math.log(sum(q[k] for k in stands_for))
        for c in range(1, old_channels):
            loss += p[c] * math.log(q[c])
        total -= loss / old_channels
    return total / len(where)


def mib_distillation(new_logits, old_logits):
    """MiB's own words: the old network's set of classes, on which the new one's distribution is folded first.

    q^(b) = q(b) + the sum over new classes of q; q^(c) = q(c) for old classes; the mean over pixels of
    -1/|Y^{t-1}| sum over Y^{t-1} of q_old(c) log q^(c).
    """
    known = old_logits.shape[1]
    values = []
    for b, i, j in pixels(new_logits.shape):
        q = softmax(new_logits[b, :, i, j])
        folded = q[:known].copy()
        folded[0] += q[known:].sum()
        assert abs(folded.sum() - 1.0) < 1e-12
        values.append(-(softmax(old_logits[b, :, i, j]) * np.log(folded)).sum() / known)
    return float(np.mean(values))


def predict(logits):
    batch, _, height, width = logits.shape
    out = np.zeros((batch, height, width), dtype=np.int64)
    for b, i, j in pixels(logits.shape):
        scores = [sigmoid(x) for x in logits[b, 1:, i, j]]
        if scores and max(scores) > 0.5:
            out[b, i, j] = 1 + scores.index(max(scores))
    return out


def confusion(labels, predictions, channels):
    out = np.zeros((channels, channels), dtype=np.int64)
    for truth, found in zip(labels.ravel(), predictions.ravel(), strict=True):
        if truth != 255:
            out[truth, found] += 1
    return out


def iou(labels, predictions, channel):
    """Percent, from sets of pixels, without a confusion matrix."""
    counted = labels.ravel() != 255
    truth = set(np.flatnonzero((labels.ravel() == channel) & counted))
    found = set(np.flatnonzero((predictions.ravel() == channel) & counted))
    return 100.0 * len(truth & found) / len(truth | found) if truth | found else 0.0


def report(labels, predictions, base, later):
    """Scores of a segmentation; ``base`` and ``later`` are lists of channels."""
    scores = {c: iou(labels, predictions, c) for c in [0, *base, *later]}
    old = sum(scores[c] for c in [0, *base]) / (1 + len(base))
    new = sum(scores[c] for c in later) / len(later)
    every = sum(scores.values()) / len(scores)
    harmonic = 2.0 / (1.0 / old + 1.0 / new) if old > 0 and new > 0 else 0.0
    return {"old": old, "new": new, "all": every, "harmonic": harmonic, "iou": scores}
