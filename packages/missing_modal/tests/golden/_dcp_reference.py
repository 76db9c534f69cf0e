"""DCP in float64 NumPy, sample by sample, from the specification's formulas; neither torch nor the package is used.

Weights come as dicts of arrays: towers by the names of the toy towers, prompts by the module's state names.
"""

import math

import numpy as np

_erf = np.vectorize(math.erf)
OBSERVED = {0: (True, True), 1: (True, False), 2: (False, True)}


def linear(x, weight, bias):
    return x @ weight.T + bias


def layer_norm(x, weight, bias, eps=1e-5):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def gelu(x):
    return x * 0.5 * (1 + _erf(x / math.sqrt(2)))


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(query, key, value, heads, mask=None):
    """(R, d) query, (S, d) key and value, projected already -> (R, d)."""
    size = query.shape[1] // heads
    parts = []
    for head in range(heads):
        cols = slice(head * size, (head + 1) * size)
        scores = query[:, cols] @ key[:, cols].T / math.sqrt(size)
        if mask is not None:
            scores = scores + mask
        parts.append(softmax(scores) @ value[:, cols])
    return np.concatenate(parts, axis=1)


def block(w, i, h, heads, mask, extra=None):
    x = layer_norm(h, w[f"{i}.ln_1.weight"], w[f"{i}.ln_1.bias"])
    q, k, v = np.split(linear(x, w[f"{i}.in.weight"], w[f"{i}.in.bias"]), 3, axis=1)
    if extra is not None:
        k, v = np.concatenate([k, extra[0]]), np.concatenate([v, extra[1]])
        if mask is not None:
            mask = np.concatenate([mask, np.zeros((len(h), len(extra[0])))], axis=1)
    h = h + linear(attention(q, k, v, heads, mask), w[f"{i}.out.weight"], w[f"{i}.out.bias"])
    x = layer_norm(h, w[f"{i}.ln_2.weight"], w[f"{i}.ln_2.bias"])
    x = quick_gelu(linear(x, w[f"{i}.fc.weight"], w[f"{i}.fc.bias"]))
    return h + linear(x, w[f"{i}.proj.weight"], w[f"{i}.proj.bias"])


def embed(w, x):
    """One input -> (tokens (S, d), index of the row that is read, causal)."""
    if "embedding" in w:
        return w["embedding"][x] + w["positions"], int(np.argmax(x)), True
    tokens = np.concatenate([w["cls"][None], x @ w["patch"]]) + w["positions"]
    return layer_norm(tokens, w["ln_pre.weight"], w["ln_pre.bias"]), 0, False


def prompt_tables(p, code, depth):
    """By modality the rows V_0 .. V_{J-1} of one type, and G(C_t), DCP 3.3."""
    state = [p[f"static.{m}"][0 if OBSERVED[code][m] else 1] for m in (0, 1)]
    deep = ([], [])
    for j in range(depth):
        z = np.concatenate(state, axis=1)
        state = []
        for m in (0, 1):
            key = f"generators.{m}.{j}"
            x = layer_norm(z, p[f"{key}.0.weight"], p[f"{key}.0.bias"])
            x = gelu(linear(x, p[f"{key}.1.weight"], p[f"{key}.1.bias"]))
            state.append(linear(x, p[f"{key}.3.weight"], p[f"{key}.3.bias"]))
            deep[m].append(state[-1])
    common = []
    for m in (0, 1):
        key = f"common_maps.{m}"
        x = gelu(linear(p["common.value"][code], p[f"{key}.0.weight"], p[f"{key}.0.bias"]))
        common.append(linear(x, p[f"{key}.2.weight"], p[f"{key}.2.bias"]))
    return deep, common


def tables_of_many(p, present, order, depth):
    """Any number of modalities (DCP 3.7): V_j by modality and block, and the common and query entries of a pattern.

    Args:
        present: tuple of booleans, by modality.
        order: patterns in the order of a table's entries; None: entries by modality, averaged over what is present.
    """
    count = len(present)

    def entry(value):
        if order is not None:
            return value[order.index(present)]
        return sum(value[k] for k in range(count) if present[k]) / sum(present)

    state = [p[f"static.{m}"][0 if present[m] else 1] for m in range(count)]
    deep = [[] for _ in range(count)]
    for j in range(depth):
        z = np.concatenate(state, axis=1)
        state = []
        for m in range(count):
            key = f"generators.{m}.{j}"
            if f"{key}.0.weight" not in p:
                continue
            x = layer_norm(z, p[f"{key}.0.weight"], p[f"{key}.0.bias"])
            x = gelu(linear(x, p[f"{key}.1.weight"], p[f"{key}.1.bias"]))
            state.append(linear(x, p[f"{key}.3.weight"], p[f"{key}.3.bias"]))
            deep[m].append(state[-1])
    common = []
    for m in range(count):
        key = f"common_maps.{m}"
        x = gelu(linear(entry(p["common.value"]), p[f"{key}.0.weight"], p[f"{key}.0.bias"]))
        common.append(linear(x, p[f"{key}.2.weight"], p[f"{key}.2.bias"]))
    return deep, common, [entry(p[f"queries.{m}.value"]) for m in range(count)]


def dynamic_prompts(p, m, code, tokens):
    """Multi-head attention with one head, as written: keys, values and their biases for all tokens."""
    d = tokens.shape[1]
    w, b = p[f"attention.{m}.in_proj_weight"], p[f"attention.{m}.in_proj_bias"]
    query = linear(p[f"queries.{m}.value"][code], w[:d], b[:d])
    key, value = linear(tokens, w[d : 2 * d], b[d : 2 * d]), linear(tokens, w[2 * d :], b[2 * d :])
    return linear(
        attention(query, key, value, 1), p[f"attention.{m}.out_proj.weight"], p[f"attention.{m}.out_proj.bias"]
    )


def feature(w, p, output, m, code, x, depth, heads):
    """Feature of one sample's modality m that is present."""
    tokens, end, causal = embed(w, x)
    deep, common = prompt_tables(p, code, depth)
    h = np.concatenate([deep[m][0], common[m], dynamic_prompts(p, m, code, tokens), tokens])
    mask = np.triu(np.full((len(h), len(h)), -np.inf), 1) if causal else None
    n = len(common[m])
    blocks = sum(key.endswith(".ln_1.weight") for key in w)
    for j in range(blocks):
        if 1 <= j < depth:
            h = np.concatenate([deep[m][j], h[n:]])
        h = block(w, j, h, heads, mask)
    row = layer_norm(h[3 * n + end], output["norm_weight"], output["norm_bias"])
    return row @ output["projection"]


def logits(towers, p, outputs, head, codes, inputs, depth, heads):
    """(B, C), one sample at a time; a missing modality's feature is zero."""
    found = []
    for sample, code in enumerate(codes):
        parts = []
        for m, name in enumerate(("image", "text")):
            size = outputs[m]["projection"].shape[1]
            if OBSERVED[code][m]:
                parts.append(feature(towers[m], p, outputs[m], m, code, inputs[name][sample], depth, heads[m]))
            else:
                parts.append(np.zeros(size))
        found.append(linear(np.concatenate(parts), head["weight"], head["bias"]))
    return np.stack(found)


def cross_entropy(z, labels):
    shifted = z - z.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return float(-np.mean([log_p[i, label] for i, label in enumerate(labels)]))


def binary_cross_entropy(z, targets):
    """Mean over samples and outputs."""
    return float(np.mean(np.maximum(z, 0) - z * targets + np.log1p(np.exp(-np.abs(z)))))
