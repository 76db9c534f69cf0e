"""Slow references in plain Python and float64, written from the specification alone (dcp.md 4.3, 4.4, 9)."""

import math
import random
import zlib

import numpy as np


def permutation(count, kind, seed, dataset, split):
    name = zlib.crc32(f"{dataset}|{split}|{kind}".encode())
    return np.random.default_rng(np.random.SeedSequence([seed, name])).permutation(count).tolist()


def table(ids, kind, ratio, seed, dataset, split):
    """id -> 0 complete, 1 text missing, 2 image missing."""
    ordered = sorted(ids)
    codes = dict.fromkeys(ordered, 0)
    b = 0.5
    for k, place in enumerate(permutation(len(ordered), kind, seed, dataset, split)):
        if k >= int(len(ordered) * ratio):
            break
        if kind == "both":
            codes[ordered[place]] = 2 if int((k + 1) * b) > int(k * b) else 1
        else:
            codes[ordered[place]] = {"text": 1, "image": 2}[kind]
    return codes


def official(count, kind, ratio, seed):
    """The published procedure, on a generator of its own."""
    draw = random.Random(seed)
    rows = draw.sample(range(count), int(count * ratio))
    values = np.zeros(count)
    values[rows] = {"text": 1, "image": 2, "both": 1}[kind]
    if kind == "both":
        values[draw.sample(rows, int(len(rows) * 0.5))] = 2
    return [int(value) for value in values]


def softmax(z):
    top = max(z)
    e = [math.exp(v - top) for v in z]
    return [v / sum(e) for v in e]


def sigmoid(v):
    return 1.0 / (1.0 + math.exp(-v))


def f1(tp, fp, fn):
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None


def mean(values):
    kept = [v for v in values if v is not None]
    return sum(kept) / len(kept) if kept else math.nan


def f1_scores(truth, predicted):
    def counts(pairs):
        tp = sum(1 for t, p in pairs if t and p)
        return tp, sum(1 for t, p in pairs if p and not t), sum(1 for t, p in pairs if t and not p)

    classes = range(len(truth[0]))
    columns = [[(t[c], p[c]) for t, p in zip(truth, predicted, strict=True)] for c in classes]
    rows = [list(zip(t, p, strict=True)) for t, p in zip(truth, predicted, strict=True)]
    by_class = [f1(*counts(pairs)) for pairs in columns]
    support = [sum(1 for t, _ in pairs if t) for pairs in columns]
    micro = f1(*counts([pair for pairs in columns for pair in pairs]))
    total = sum(support)
    weighted = sum(s * f for s, f in zip(support, by_class, strict=True) if s) / total if total else math.nan
    return {
        "macro": mean(by_class),
        "micro": math.nan if micro is None else micro,
        "samples": mean([f1(*counts(pairs)) for pairs in rows]),
        "weighted": weighted,
    }


def auroc(truth, score):
    positive = [s for t, s in zip(truth, score, strict=True) if t]
    negative = [s for t, s in zip(truth, score, strict=True) if not t]
    if not positive or not negative:
        return math.nan
    won = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative)
    return won / (len(positive) * len(negative))


def ece(confidence, right):
    total = 0.0
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        inside = [i for i, c in enumerate(confidence) if low < c <= high]
        if inside:
            share = sum(right[i] for i in inside) / len(inside)
            sure = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(share - sure)
    return total


def metrics(logits, labels, task):
    """All metrics of a set of samples."""
    if task == "multilabel":
        p = [[sigmoid(v) for v in z] for z in logits]
        flat = [(q, t) for ps, ts in zip(p, labels, strict=True) for q, t in zip(ps, ts, strict=True)]
        predicted = [[q >= 0.5 for q in ps] for ps in p]
        found = {f"f1_{k}": v for k, v in f1_scores(labels, predicted).items()}
        found["nll"] = mean([-math.log(q) if t else -math.log(1 - q) for q, t in flat])
        found["brier"] = mean([(q - t) ** 2 for q, t in flat])
        found["ece"] = ece([max(q, 1 - q) for q, _ in flat], [(q >= 0.5) == bool(t) for q, t in flat])
        return found
    p = [softmax(z) for z in logits]
    predicted = [max(range(len(ps)), key=lambda c, ps=ps: ps[c]) for ps in p]
    right = [a == b for a, b in zip(predicted, labels, strict=True)]
    found = {"accuracy": mean([float(r) for r in right])}
    if task == "binary":
        found["auroc"] = auroc(labels, [ps[1] for ps in p])
    found["nll"] = mean([-math.log(ps[t]) for ps, t in zip(p, labels, strict=True)])
    found["brier"] = mean([sum((q - (c == t)) ** 2 for c, q in enumerate(ps)) for ps, t in zip(p, labels, strict=True)])
    found["ece"] = ece([max(ps) for ps in p], right)
    return found


def temperature(logits, labels, task, low=0.01, high=100.0):
    """Smallest NLL over log T by golden-section search."""
    z = np.asarray(logits, dtype=np.float64)
    y = np.asarray(labels)

    def nll(log_t):
        s = z / math.exp(log_t)
        if task == "multilabel":
            return float(np.mean(np.logaddexp(0, s) - s * y))
        top = s.max(axis=1, keepdims=True)
        logs = s - top - np.log(np.exp(s - top).sum(axis=1, keepdims=True))
        return -float(np.mean(logs[np.arange(len(y)), y]))

    a, b = math.log(low), math.log(high)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(80):
        c, d = b - ratio * (b - a), a + ratio * (b - a)
        if nll(c) < nll(d):
            b = d
        else:
            a = c
    return math.exp((a + b) / 2)
