"""Float64 NumPy encoder of one image (tile, temporal slice) for Qwen2-VL, 2.5, 3, InternVL and SmolVLM, written apart.

Attention is dense over the image with a mask where rows lie in other windows or are padding; cells are ranked and
merged as iLLaVA 3.3-3.6 says. Slow and plain on purpose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ACTIVATIONS = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def array(tensor: Any) -> np.ndarray:
    return tensor.detach().double().numpy()


def linear(module: Any, x: np.ndarray) -> np.ndarray:
    out = x @ array(module.weight).T
    return out if module.bias is None else out + array(module.bias)


def norm(module: Any, x: np.ndarray) -> np.ndarray:
    """LayerNorm, or RMSNorm where the module has no bias."""
    eps = getattr(module, "eps", None) or module.variance_epsilon
    if getattr(module, "bias", None) is None:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * array(module.weight)
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * array(module.weight) + array(module.bias)


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x (n, H, d), tables (n, d)."""
    half = x.shape[-1] // 2
    turned = np.concatenate([-x[..., half:], x[..., :half]], -1)
    return x * cos[:, None] + turned * sin[:, None]


def projections(block: Any, x: np.ndarray, heads: int) -> list[np.ndarray]:
    """q, k, v (n, H, d) and the output projection's module last."""
    if hasattr(block, "attn"):
        qkv = linear(block.attn.qkv, norm(block.norm1, x)).reshape(len(x), 3, heads, -1)
        return [qkv[:, 0], qkv[:, 1], qkv[:, 2], block.attn.proj]
    inner = getattr(block, "attention", None) or block.self_attn
    normed = norm(getattr(block, "layernorm_before", None) or block.layer_norm1, x)
    found = [linear(getattr(inner, f"{name}_proj"), normed).reshape(len(x), heads, -1) for name in "qkv"]
    return [*found, getattr(inner, "projection_layer", None) or inner.out_proj]


def feed(block: Any, x: np.ndarray, act: str) -> np.ndarray:
    second = next(
        getattr(block, name) for name in ("norm2", "layernorm_after", "layer_norm2") if getattr(block, name, None)
    )
    h, mlp, f = norm(second, x), block.mlp, ACTIVATIONS[act]
    if hasattr(mlp, "gate_proj"):
        out = linear(mlp.down_proj, f(linear(mlp.gate_proj, h)) * linear(mlp.up_proj, h))
    elif hasattr(mlp, "linear_fc1"):
        out = linear(mlp.linear_fc2, f(linear(mlp.linear_fc1, h)))
    else:
        out = linear(mlp.fc2, f(linear(mlp.fc1, h)))
    return out * array(block.lambda_2) if hasattr(block, "lambda_2") else out


def drop(x: np.ndarray, scores: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    kept = np.sort(np.argsort(-scores, kind="stable")[:keep])
    return x[kept], kept


def recycle(x: np.ndarray, scores: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """iLLaVA 3.4 with pc_ratio .05 and 5 sources."""
    order = np.argsort(-scores, kind="stable")
    kept, rest, out = order[:keep], order[keep:], x.copy()
    for p in kept[keep - max(1, round(0.05 * keep)) :]:
        likeness = x[rest] @ x[p]
        near = np.argsort(-likeness, kind="stable")[: min(5, len(rest))]
        a = softmax(likeness[near] / math.sqrt(x.shape[1]))
        out[p] = (x[p] + a @ x[rest[near]]) / 2
    kept = np.sort(kept)
    return out[kept], kept


@dataclass
class Found:
    """rows: original row of each patch left. x: (prefix + m, D). taps: rows and x after each block."""

    rows: np.ndarray
    x: np.ndarray
    taps: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)


def encode(
    blocks: Any,
    x: np.ndarray,
    heads: int,
    act: str,
    steps: dict[int, int],
    rule: Any = drop,
    tables: tuple[np.ndarray, np.ndarray] | None = None,
    windows: list[np.ndarray] | None = None,
    raster: np.ndarray | None = None,
    prefix: int = 0,
    group: int = 4,
    bias: np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> Found:
    """Encode one image.

    Args:
        blocks: of the model. x: (prefix + n, D), cells side by side. heads, act: of the blocks.
        steps: {block: cells kept}. rule: (cells, scores, keep) -> (cells, kept).
        tables: cos, sin (n, d). windows: per block, (n,) window of each row.
        raster: (n / group,) raster number of each cell; the rule gets cells in that order.
        prefix, group: of the encoder. bias: (n / group,) added to the logits of a cell's keys after the first step.
        valid: (n,) False for padded patches: no keys, no queries of a score (prefix 0 only).
    """
    rows = np.arange(len(x) - prefix)
    found = Found(rows, x)
    for layer, block in enumerate(blocks):
        q, k, v, out = projections(block, x, heads)
        if tables is not None:
            q, k = (rotate(t, tables[0][rows], tables[1][rows]) for t in (q, k))
        logits = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        if windows is not None:
            logits = np.where(windows[layer][rows][:, None] == windows[layer][rows], logits, -np.inf)
        real = np.ones(len(x), bool) if valid is None else valid[rows]
        logits = np.where(real, logits, -np.inf)
        if bias is not None and len(rows) < len(found.rows):
            logits[..., prefix:] += bias[rows // group]
        attention = softmax(logits)
        update = linear(out, np.einsum("hqk,khd->qhd", attention, v).reshape(len(x), -1))
        x = x + (update * array(block.lambda_1) if hasattr(block, "lambda_1") else update)
        if layer in steps:
            received = attention[:, real].mean((0, 1))[prefix:]
            found.scores.append(received)
            cells = x[prefix:].reshape(-1, group * x.shape[1])
            mean, at = received.reshape(-1, group).mean(1), rows[::group] // group
            order = np.argsort(at if raster is None else raster[at])
            merged, kept = rule(cells[order], mean[order], steps[layer])
            back = np.argsort(order[kept])
            merged, kept = merged[back], order[kept][back]
            x = np.concatenate([x[:prefix], merged.reshape(-1, x.shape[1])])
            rows = rows.reshape(-1, group)[kept].ravel()
        x = x + feed(block, x, act)
        found.taps.append((rows, x))
    return Found(rows, x, found.taps, found.scores)
