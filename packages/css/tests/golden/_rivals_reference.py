"""Slow, independent float64 versions of the losses of EIR's rivals: loops over pictures, pixels, channels and tiles.

Nothing here imports the package under test or torch. Arrays: logits (B, S, H, W), labels (B, H, W).
"""

import math

import numpy as np

IGNORE = 255


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def softmax(row):
    e = np.exp(row - np.max(row))
    return e / e.sum()


def bce(logit, target, pos_weight=1.0):
    """-w t log(sigmoid) - (1 - t) log(1 - sigmoid), by log1p."""
    log_p = -math.log1p(math.exp(-abs(logit))) + min(logit, 0.0)
    log_not_p = log_p - logit
    return -pos_weight * target * log_p - (1.0 - target) * log_not_p


def pixels(labels):
    return list(np.ndindex(labels.shape))


def bilinear(maps, size):
    """Resize (B, C, h, w) with half-pixel centres, indices clamped at the border."""
    batch, channels, h, w = maps.shape
    out = np.zeros((batch, channels, *size))
    for i in range(size[0]):
        for j in range(size[1]):
            y = max((i + 0.5) * h / size[0] - 0.5, 0.0)
            x = max((j + 0.5) * w / size[1] - 0.5, 0.0)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            fy, fx = y - y0, x - x0
            top = (1 - fx) * maps[:, :, y0, x0] + fx * maps[:, :, y0, x1]
            low = (1 - fx) * maps[:, :, y1, x0] + fx * maps[:, :, y1, x1]
            out[:, :, i, j] = (1 - fy) * top + fy * low
    return out


# ------------------------------------------------------------------ sigmoid methods


def binary(logits, labels, unknown=None, unknown_logits=None):
    """Sum over channels of binary cross-entropies, mean over pixels that are not ignored; SSUL's extra channel last."""
    total, count = 0.0, 0
    for b, i, j in pixels(labels):
        if labels[b, i, j] == IGNORE:
            continue
        count += 1
        hidden = unknown is not None and labels[b, i, j] == 0 and unknown[b, i, j]
        for c in range(logits.shape[1]):
            total += bce(logits[b, c, i, j], float(c == labels[b, i, j] and not hidden))
        if unknown_logits is not None:
            total += bce(unknown_logits[b, 0, i, j], float(hidden))
    return total / count


def sure_labels(labels, old_logits, threshold, old_unknown=None):
    """Background pixels whose best channel of all, background and unknown included, is a class with enough sigmoid."""
    out = labels.copy()
    for b, i, j in pixels(labels):
        row = list(old_logits[b, :, i, j])
        best = int(np.argmax(row))
        beaten = old_unknown is not None and old_unknown[b, 0, i, j] > row[best]
        if labels[b, i, j] == 0 and best > 0 and not beaten and sigmoid(row[best]) >= threshold:
            out[b, i, j] = best
    return out


# ------------------------------------------------------------------ softmax methods


def cross_entropy(logits, labels, background=1, factor=None):
    """Mean over all pixels; the first channels are one class together."""
    total = 0.0
    for b, i, j in pixels(labels):
        y = labels[b, i, j]
        if y == IGNORE:
            continue
        p = softmax(logits[b, :, i, j])
        mass = p[y] if y >= background else p[:background].sum()
        total -= math.log(mass) * (1.0 if factor is None else factor[b])
    return total / labels.size


def unbiased_distillation(new, old):
    """MiB: background's old mass against background and new classes together, mean over old channels and pixels."""
    channels = old.shape[1]
    total = 0.0
    for b, i, j in np.ndindex(new.shape[0], *new.shape[2:]):
        p, q = softmax(old[b, :, i, j]), softmax(new[b, :, i, j])
        total += p[0] * math.log(q[0] + q[channels:].sum())
        total += sum(p[c] * math.log(q[c]) for c in range(1, channels))
    return -total / channels / (new.shape[0] * new.shape[2] * new.shape[3])


# ------------------------------------------------------------------ PLOP


def entropy(row):
    p = softmax(row)
    return -sum(x * math.log(x) for x in p if x > 0) / math.log(len(p))


def medians(samples, channels, bins, floor):
    """Thresholds of (channel, entropy) pairs: the value below which half of a channel's histogram lies."""
    out = np.full(channels, floor)
    for c in range(channels):
        values = [value for channel, value in samples if channel == c]
        counts = [0] * bins
        for value in values:
            counts[min(int(value * bins), bins - 1)] += 1
        half, below = len(values) / 2, 0
        for place, count in enumerate(counts):
            if count and below + count >= half:
                out[c] = max(floor, (place + (half - below) / count) / bins)
                break
            below += count
    return out


def background_samples(old_logits, labels):
    return [
        (int(np.argmax(old_logits[b, :, i, j])), entropy(old_logits[b, :, i, j]))
        for b, i, j in pixels(labels)
        if labels[b, i, j] == 0
    ]


def entropy_labels(labels, old_logits, thresholds):
    out, factor = labels.copy(), np.ones(len(labels))
    channels = old_logits.shape[1]
    for b in range(len(labels)):
        kept = total = 0
        for i, j in np.ndindex(labels.shape[1:]):
            if labels[b, i, j] >= channels:
                continue
            total += 1
            best = int(np.argmax(old_logits[b, :, i, j]))
            if entropy(old_logits[b, :, i, j]) < thresholds[best]:
                out[b, i, j] = best
                kept += 1
            else:
                out[b, i, j] = IGNORE
        if total:
            factor[b] = kept / total
    return out, factor


def pod_embedding(x, scales):
    """Means of the rows and of the columns of every tile of one picture (C, h, w)."""
    channels, h, w = x.shape
    out = []
    for s in scales:
        th, tw = h // s, w // s
        if th == 0 or tw == 0:
            continue
        for a in range(s):
            for b in range(s):
                for c in range(channels):
                    tile = x[c, a * th : (a + 1) * th, b * tw : (b + 1) * tw]
                    out += [sum(row) / tw for row in tile]
                    out += [sum(column) / th for column in tile.T]
    return np.array(out)


def pod(new, old, scales=(1, 2, 4)):
    distances = [
        math.sqrt(((pod_embedding(a**2, scales) - pod_embedding(b**2, scales)) ** 2).sum())
        for a, b in zip(new, old, strict=True)
    ]
    return sum(distances) / len(distances)


def folded(logits, channels):
    out = logits[:, :channels].copy()
    for c in range(channels, logits.shape[1]):
        out[:, 0] += logits[:, c]
    return out


# ------------------------------------------------------------------ DKD


def by_class(logits, target, pos_weight=1.0, valid=None):
    """Mean over pixels by class, then the sum over classes."""
    batch, classes, h, w = logits.shape
    total = 0.0
    for c in range(classes):
        values = [
            bce(logits[b, c, i, j], target[b, c, i, j], pos_weight)
            for b, i, j in np.ndindex(batch, h, w)
            if valid is None or valid[b, i, j]
        ]
        total += sum(values) / len(values)
    return total


def own_targets(labels, first, classes):
    out = np.zeros((labels.shape[0], classes, *labels.shape[1:]))
    for b, i, j in pixels(labels):
        if first <= labels[b, i, j] < first + classes:
            out[b, labels[b, i, j] - first, i, j] = 1.0
    return out


def reasoning(feature, weight):
    """Sums of the positive and of the negative products of a pixel's feature with a class's weights."""
    batch, width, h, w = feature.shape
    plus, minus = np.zeros((2, batch, len(weight), h, w))
    for b, c, i, j in np.ndindex(batch, len(weight), h, w):
        for d in range(width):
            product = feature[b, d, i, j] * weight[c, d]
            if weight[c, d] > 0:
                plus[b, c, i, j] += product
            else:
                minus[b, c, i, j] += product
    return plus, minus


def soft(values):
    return np.vectorize(sigmoid)(values)
