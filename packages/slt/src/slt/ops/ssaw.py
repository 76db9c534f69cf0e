"""The mathematics of sigmoid self-attention weighting (SSAW): joined tokens in, weighted tokens out.

Source: SSL-SSAW (arXiv 2509.14036), our reading, section 3.4. The paper's equations could not be read, hence two
modes. Scores, softmax and sigmoid are worked out in float32 at least, whatever autocast says. Padded content is
replaced, never multiplied by zero, so that NaN or infinity in it reaches neither an output nor a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from slt.ops.precision import at_least_float32

__all__ = ["gate_tokens", "join_tokens", "merge_heads", "sigmoid_attention", "softmax_context", "split_heads"]


def join_tokens(
    question: Tensor, question_mask: Tensor, sign: Tensor, sign_mask: Tensor, type_embedding: Tensor
) -> tuple[Tensor, Tensor]:
    """Concatenate question and sign tokens in time, each with its type vector; padding becomes zero.

    Args:
        question: (B, Lq, d); Lq = 0 is an absent question.
        question_mask: (B, Lq) bool, True = valid.
        sign: (B, Lv, d).
        sign_mask: (B, Lv) bool, True = valid.
        type_embedding: (2, d), row 0 for the question, row 1 for signs.

    Returns:
        ``(Z, mask)``: (B, Lq + Lv, d), question first, and (B, Lq + Lv) bool.
    """
    joined = torch.cat([question + type_embedding[0], sign + type_embedding[1]], dim=1)
    mask = torch.cat([question_mask, sign_mask], dim=1)
    return joined.masked_fill(~mask[..., None], 0.0), mask


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, d) -> (B, h, L, d/h)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, h, L, d/h) -> (B, L, d)."""
    return x.transpose(1, 2).flatten(2)


def softmax_context(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax self-attention over the valid keys: the context from which the gate is made.

    Args:
        q: (B, h, L, d_h) queries.
        k: (B, h, L, d_h) keys.
        v: (B, h, L, d_h) values.
        mask: (B, L) bool, True = valid key.

    Returns:
        (B, h, L, d_h), float32 or float64. A row without any valid key attends to all of its (zeroed) tokens and
        stays finite; its output is masked later.
    """
    keys = mask | ~mask.any(dim=1, keepdim=True)
    with torch.autocast(device_type=q.device.type, enabled=False):
        return F.scaled_dot_product_attention(
            at_least_float32(q), at_least_float32(k), at_least_float32(v), attn_mask=keys[:, None, None, :]
        )


def gate_tokens(tokens: Tensor, gate_logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weight every token by a sigmoid: out = sigmoid(logits) * Z at valid positions, 0 elsewhere.

    Args:
        tokens: (B, L, d) joined tokens Z.
        gate_logits: (B, L, d) for one weight a channel, or (B, L, 1) for one weight a token.
        mask: (B, L) bool, True = valid.

    Returns:
        ``(out, gate)``: (B, L, d), and the weights in [0, 1], shaped as ``gate_logits`` and 0 at padding.
    """
    gate = torch.sigmoid(at_least_float32(gate_logits)).masked_fill(~mask[..., None], 0.0)
    return gate * tokens, gate


def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with a sigmoid in place of the softmax: A_ij = sigmoid(S_ij - ln n) * m_j, S = q k^T / sqrt(d_h).

    n is the number of valid tokens of that sample, so padding changes nothing; the bias makes A = 1/(1+n) where S = 0.
    Rows of A do not sum to 1.

    Args:
        q: (B, h, L, d_h) queries.
        k: (B, h, L, d_h) keys.
        v: (B, h, L, d_h) values.
        mask: (B, L) bool, True = valid key.

    Returns:
        ``(context, A)``: (B, h, L, d_h) and (B, h, L, L), float32 or float64. A is 0 at padded keys; rows of padded
        queries are not zeroed.
    """
    with torch.autocast(device_type=q.device.type, enabled=False):
        scores = at_least_float32(q) @ at_least_float32(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
        count = mask.sum(dim=1).clamp(min=1).to(scores.dtype)
        weights = torch.sigmoid(scores - count.log()[:, None, None, None])
        weights = weights.masked_fill(~mask[:, None, None, :], 0.0)
        return weights @ at_least_float32(v), weights
