"""Importance scores in plain float64 NumPy, written from iLLaVA 3.2, one head and one query at a time."""

import numpy as np


def importance(query, key, scaling, kind, prefix=0, key_bias=None, mask=None):
    """(n - prefix,) scores of one image; query (H, n, d), key (K, n, d), mask (n, n) additive."""
    heads, rows, _ = query.shape
    group = heads // key.shape[0]
    scores = np.zeros(rows)
    for head in range(heads):
        for q in range(rows):
            logits = np.array([query[head, q] @ key[head // group, j] * scaling for j in range(rows)])
            if key_bias is not None:
                logits[prefix:] += key_bias
            if mask is not None:
                logits += mask[q]
            peak = logits.max()
            total = np.exp(logits - peak).sum()
            if kind == "received":
                scores += np.exp(logits - peak) / total / rows / heads
            elif kind == "cls" and q == 0:
                scores += np.exp(logits - peak) / total / heads
            elif kind == "lse":
                scores[q] += (peak + np.log(total)) / heads
    return scores[prefix:]
