"""Float64 NumPy truth of the cache rules, written from LightVLM 3.6 and 5 with plain loops over heads and queries."""

import math

import numpy as np


def attention_row(query, keys, visible, scaling, cap=None):
    """Softmax over the visible keys of one query; zeros elsewhere."""
    row = np.zeros(len(keys))
    seen = np.flatnonzero(visible)
    if len(seen) == 0:
        return row
    logits = np.array([float(query @ keys[j]) * scaling for j in seen])
    if cap is not None:
        logits = cap * np.tanh(logits / cap)
    powers = np.exp(logits - logits.max())
    row[seen] = powers / powers.sum()
    return row


def group_rows(case, batch, kv_head, at):
    """Attention of query number ``at``, mean over the query heads of a key/value head."""
    queries, keys = case["queries"], case["keys"]
    group = queries.shape[1] // keys.shape[1]
    where = case["query_index"][batch, at]
    visible = case["valid"][batch, kv_head] & (case["index"][batch, kv_head] <= where)
    rows = [
        attention_row(
            queries[batch, kv_head * group + g, at], keys[batch, kv_head], visible, case["scaling"], case.get("cap")
        )
        for g in range(group)
    ]
    return sum(rows) / group, visible


def sums(case):
    """(column sums, queries that saw the entry) of all queries."""
    shape = case["valid"].shape
    total, seen = np.zeros(shape), np.zeros(shape)
    for b in range(shape[0]):
        for k in range(shape[1]):
            for at in range(case["queries"].shape[2]):
                row, visible = group_rows(case, b, k, at)
                total[b, k] += row
                seen[b, k] += visible
    return total, seen


def window(case, width, pool):
    """Mean over the last ``width`` queries that are no padding, then average pooling with zeros beyond the ends."""
    shape = case["valid"].shape
    scores = np.zeros(shape)
    for b in range(shape[0]):
        last = [at for at in range(case["queries"].shape[2])][-width:]
        real = [at for at in last if case["query_index"][b, at] >= 0]
        for k in range(shape[1]):
            for at in real:
                scores[b, k] += group_rows(case, b, k, at)[0] / len(real)
    pooled = np.zeros(shape)
    half = pool // 2
    for j in range(shape[2]):
        for i in range(max(0, j - half), min(shape[2], j + half + 1)):
            pooled[..., j] += scores[..., i] / pool
    return pooled


def keep_best(scores, valid, stay, entries):
    """Rows kept of one head: protected first, then by score, padding last; ties to the lower row; ascending."""

    def rank(j):
        if not valid[j]:
            return (2, 0.0, j)
        return (0, 0.0, j) if stay[j] else (1, -scores[j], j)

    return sorted(sorted(range(len(scores)), key=rank)[:entries])


def keep_across_heads(scores, entries, safe=0.2):
    """AdaKV, one sample (K, n): each head's best int(safe * b), then the best of all heads until K * b."""
    heads, count = scores.shape
    kept = set()
    for k in range(heads):
        order = sorted(range(count), key=lambda j: (-scores[k, j], j))
        kept |= {(k, j) for j in order[: int(safe * entries)]}
    rest = sorted(((k, j) for k in range(heads) for j in range(count)), key=lambda at: (-scores[at], at))
    for at in rest:
        if len(kept) == heads * entries:
            break
        kept.add(at)
    mask = np.zeros(scores.shape, dtype=bool)
    for at in kept:
        mask[at] = True
    return mask


def rotate(vector, position, theta=10000.0):
    """Rotary embedding of one vector at a position, halves convention."""
    half = len(vector) // 2
    out = np.empty_like(vector)
    for i in range(half):
        angle = position / theta ** (2 * i / len(vector))
        a, b = vector[i], vector[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out
