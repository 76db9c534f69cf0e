"""The rivals' tables and forward passes in float64 NumPy, sample by sample; neither torch nor the package is used.

``ref`` is the module of ``_dcp_reference.py``: blocks, norms, embedding.
"""

import numpy as np


def encode(ref, w, output, x, depth, heads, insert, keys=None):
    """One input through a tower.

    Args:
        insert: function (block, rows so far or None, number of rows in front) -> rows (R, d) in front of the tokens
            at this block, where None leaves them as they are.
        keys: function block -> (keys, values) or None.
    """
    tokens, end, causal = ref.embed(w, x)
    front = np.zeros((0, tokens.shape[1]))
    for j in range(depth):
        rows = insert(j, front)
        front = front if rows is None else rows
        h = np.concatenate([front, tokens])
        mask = np.triu(np.full((len(h), len(h)), -np.inf), 1) if causal else None
        h = ref.block(w, j, h, heads, mask, keys(j) if keys else None)
        front, tokens = h[: len(front)], h[len(front) :]
    return ref.layer_norm(tokens[end], output["norm_weight"], output["norm_bias"]) @ output["projection"]


def no_rows(j, front):
    return None


def replaced(table):
    """Insert function of a (J, L, d) table that replaces."""
    return lambda j, front: table[j] if j < len(table) else None


def accumulated(table):
    return lambda j, front: np.concatenate([table[j], front]) if j < len(table) else None


def halves(table):
    """Keys and values of a (J, L, d) table."""
    half = table.shape[1] // 2
    return lambda j: (table[j, :half], table[j, half:]) if j < len(table) else None


def msp_table(value, has):
    """(M, J, L, d) -> (J, L, d): the sum over the modalities that are there."""
    total = np.zeros(value.shape[1:])
    for k, there in enumerate(has):
        if there:
            total = total + value[k]
    return total


def msp_penalty(values):
    """Mean over towers and blocks of |cosine| between the two modalities' prompts."""
    found = []
    for value in values:
        for j in range(value.shape[1]):
            a, b = value[0, j].ravel(), value[1, j].ravel()
            found.append(abs(a @ b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-8))
    return float(np.mean(found))


def maple_tables(ref, p, depth):
    """(image, text): linear images of the text prompts, and these."""
    text = p["prompts"]
    image = [ref.linear(text[j], p[f"couplings.0.{j}.weight"], p[f"couplings.0.{j}.bias"]) for j in range(depth)]
    return np.stack(image), text
