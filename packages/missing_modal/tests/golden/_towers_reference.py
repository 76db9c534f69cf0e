"""The package's own towers, DCP over any number of them, ViLT with prompts, AdamW: float64 NumPy, sample by sample.

Weights are arrays by the names of ``TransformerTower``; ``ref`` is the module of ``_dcp_reference.py``. Neither torch
nor the package is used.
"""

import numpy as np


def patches_of(picture, weight):
    """(C, H, W) pixels -> (rows of patches, columns of patches, d): a dot product of each patch with the filters."""
    d, _, height, width = weight.shape
    down, across = picture.shape[1] // height, picture.shape[2] // width
    found = np.zeros((down, across, d))
    for i in range(down):
        for j in range(across):
            part = picture[:, i * height : (i + 1) * height, j * width : (j + 1) * width]
            found[i, j] = [(part * one).sum() for one in weight]
    return found


def embed(ref, kind, w, x):
    """One input -> (tokens (S, d), row that is read, causal)."""
    if kind == "text":
        return w["token.weight"][x] + w["position"][: len(x)], int(np.argmax(x)), True
    if kind == "image":
        rows = patches_of(x, w["patch.weight"]).reshape(-1, len(w["patch.weight"]))
    elif kind == "patches":
        rows = x @ w["patch.weight"].T
    elif kind == "audio":  # along time first: all bands of a time, then the next time
        cells = patches_of(x[None], w["patch.weight"])
        rows = np.stack([cells[band, time] for time in range(cells.shape[1]) for band in range(cells.shape[0])])
    else:
        tokens, group, _ = w["token.weight"].shape
        padded = np.concatenate([x, np.zeros(tokens * group - len(x))]).reshape(tokens, group)
        rows = np.stack([padded[t] @ w["token.weight"][t] + w["token.bias"][t] for t in range(tokens)])
    rows = np.concatenate([w["class_embedding"][None], rows])
    if "position" in w:
        rows = rows + w["position"][: len(rows)]
    if "norm_pre.weight" in w:
        rows = ref.layer_norm(rows, w["norm_pre.weight"], w["norm_pre.bias"])
    return rows, 0, False


def block(ref, w, i, h, heads, mask=None, extra=None):
    """Pre-norm block with exact GELU; ``extra`` keys and values join after their projections."""
    part = {key.removeprefix(f"block.{i}."): value for key, value in w.items() if key.startswith(f"block.{i}.")}
    x = ref.layer_norm(h, part["norm_1.weight"], part["norm_1.bias"])
    q, k, v = np.split(ref.linear(x, part["attention_in.weight"], part["attention_in.bias"]), 3, axis=1)
    if extra is not None:
        k, v = np.concatenate([k, extra[0]]), np.concatenate([v, extra[1]])
        mask = None if mask is None else np.concatenate([mask, np.zeros((len(h), len(extra[0])))], axis=1)
    mixed = ref.attention(q, k, v, heads, mask)
    h = h + ref.linear(mixed, part["attention_out.weight"], part["attention_out.bias"])
    x = ref.layer_norm(h, part["norm_2.weight"], part["norm_2.bias"])
    x = ref.gelu(ref.linear(x, part["mlp_in.weight"], part["mlp_in.bias"]))
    return h + ref.linear(x, part["mlp_out.weight"], part["mlp_out.bias"])


def depth_of(w):
    return sum(key.endswith(".norm_1.weight") for key in w)


def prompts(ref, p, present, order, depth, reach):
    """V_j by modality and block j < reach_m, common rows and queries by modality (None where nothing is put in)."""
    everyone = range(len(present))

    def entry(value):
        if order is not None:
            return value[order.index(present)]
        return np.mean([value[m] for m in everyone if present[m]], axis=0)

    state = [p[f"static.{m}"][0 if present[m] else 1] for m in everyone]
    deep = [[] for _ in everyone]
    for j in range(depth):
        z = np.concatenate(state, axis=1)
        made = []
        for m in everyone:
            key = f"generators.{m}.{j}"
            if f"{key}.0.weight" not in p:
                assert j == depth - 1, "only the last step of a short tower may be left out"
                continue
            x = ref.layer_norm(z, p[f"{key}.0.weight"], p[f"{key}.0.bias"])
            x = ref.gelu(ref.linear(x, p[f"{key}.1.weight"], p[f"{key}.1.bias"]))
            made.append(ref.linear(x, p[f"{key}.3.weight"], p[f"{key}.3.bias"]))
            if j < reach[m]:
                deep[m].append(made[-1])
        state = made
    common, queries = [], []
    for m in everyone:
        if not reach[m]:
            common.append(None)
            queries.append(None)
            continue
        key = f"common_maps.{m}"
        x = ref.gelu(ref.linear(entry(p["common.value"]), p[f"{key}.0.weight"], p[f"{key}.0.bias"]))
        common.append(ref.linear(x, p[f"{key}.2.weight"], p[f"{key}.2.bias"]))
        queries.append(entry(p[f"queries.{m}.value"]))
    return deep, common, queries


def dynamic(ref, p, m, query, tokens):
    """Attention with one head, as written."""
    d = tokens.shape[1]
    w, b = p[f"attention.{m}.in_proj_weight"], p[f"attention.{m}.in_proj_bias"]
    q = ref.linear(query, w[:d], b[:d])
    k, v = ref.linear(tokens, w[d : 2 * d], b[d : 2 * d]), ref.linear(tokens, w[2 * d :], b[2 * d :])
    out_w, out_b = p[f"attention.{m}.out_proj.weight"], p[f"attention.{m}.out_proj.bias"]
    return ref.linear(ref.attention(q, k, v, 1), out_w, out_b)


def dcp_logits(ref, towers, p, outputs, head, samples, order, depth):
    """(B, C) logits.

    Args:
        towers: (kind, weights, heads) by modality; kind ``vector`` has no blocks.
        outputs: arrays by modality: norm_weight, norm_bias, projection (may lack); None without blocks.
        samples: (present, inputs by modality) each.
        order: patterns of a table's entries; None: additive.
    """
    reach = [min(depth, depth_of(w)) for _, w, _ in towers]
    found = []
    for present, inputs in samples:
        deep, common, queries = prompts(ref, p, present, order, depth, reach)
        parts = []
        for m, (kind, w, heads) in enumerate(towers):
            size = len(inputs[m]) if kind == "vector" else outputs[m].get("projection", w["out.norm.weight"]).shape[-1]
            if not present[m]:
                parts.append(np.zeros(size))
                continue
            if kind == "vector":
                parts.append(inputs[m])
                continue
            tokens, end, causal = embed(ref, kind, w, inputs[m])
            h = np.concatenate([deep[m][0], common[m], dynamic(ref, p, m, queries[m], tokens), tokens])
            mask = np.triu(np.full((len(h), len(h)), -np.inf), 1) if causal else None
            n = len(common[m])
            for j in range(depth_of(w)):
                h = np.concatenate([deep[m][j], h[n:]]) if 1 <= j < reach[m] else h
                h = block(ref, w, j, h, heads, mask)
            row = ref.layer_norm(h[3 * n + end], outputs[m]["norm_weight"], outputs[m]["norm_bias"])
            parts.append(row @ outputs[m]["projection"] if "projection" in outputs[m] else row)
        found.append(ref.linear(np.concatenate(parts), head["weight"], head["bias"]))
    return np.stack(found)


def vilt_logits(ref, image, text, heads, table, output, pooler, head, samples, attention):
    """(B, C) of missing-aware prompts on ViLT.

    Args:
        image, text: weights of the two embeddings, the image's with the blocks.
        table: (patterns, J, L, d).
        samples: (entry of the table, ids, picture) each, placeholders filled in.
        attention: keys and values in place of rows, which accumulate.
    """
    found = []
    for place, ids, picture in samples:
        rows = text["token.weight"][ids] + text["position"][: len(ids)]
        rows = ref.layer_norm(rows, text["norm.weight"], text["norm.bias"]) + text["type"]
        cells = patches_of(picture, image["patch.weight"]).reshape(-1, rows.shape[1]) + image["patch.bias"]
        cells = np.concatenate([image["class_embedding"][None], cells]) + image["position"] + image["type"]
        h, front = np.concatenate([rows, cells]), 0
        half = table.shape[2] // 2
        for j in range(depth_of(image)):
            extra = None
            if j < table.shape[1] and attention:
                extra = table[place, j, :half], table[place, j, half:]
            elif j < table.shape[1]:
                h, front = np.concatenate([table[place, j], h]), front + table.shape[2]
            mask = np.zeros((len(h), len(h)))
            mask[:, [front + at for at, one in enumerate(ids) if one == 0]] = -np.inf
            h = block(ref, image, j, h, heads, mask, extra)
        row = ref.layer_norm(h[front], output["norm_weight"], output["norm_bias"])
        row = np.tanh(ref.linear(row, pooler["weight"], pooler["bias"]))
        x = ref.linear(row, head["0.weight"], head["0.bias"])
        x = ref.gelu(ref.layer_norm(x, head["1.weight"], head["1.bias"]))
        found.append(ref.linear(x, head["3.weight"], head["3.bias"]))
    return np.stack(found)


def adamw(value, grads, rates, decay, betas=(0.9, 0.98), eps=1e-8):
    """The values after each step (Loshchilov and Hutter 2019): decay of the value itself, moments corrected."""
    first, second, found = np.zeros_like(value), np.zeros_like(value), []
    for step, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        value = value * (1 - rate * decay)
        first = betas[0] * first + (1 - betas[0]) * grad
        second = betas[1] * second + (1 - betas[1]) * grad**2
        spread = np.sqrt(second / (1 - betas[1] ** step)) + eps
        value = value - rate * first / (1 - betas[0] ** step) / spread
        found.append(value)
    return found


def rate(step, total, warmup=0.1):
    """Share of the peak rate at a step from 0: linear from 0 over the first tenth, then linear to 0."""
    warm = int(warmup * total)
    return step / warm if step < warm else (total - step) / (total - warm)
