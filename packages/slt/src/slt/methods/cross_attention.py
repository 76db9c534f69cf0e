"""Sign tokens that look at the question: V + MHA(V, Q, Q)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import init

from slt.methods.base import Fusion, FusionOutput
from slt.ops.precision import at_least_float32
from slt.ops.ssaw import merge_heads, split_heads

__all__ = ["CrossAttention", "CrossAttentionConfig"]


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Hyper-parameters of ``CrossAttention``.

    Args:
        bias: whether the four projections have a bias.
        residual_std: standard deviation of ``out_proj``'s initial weights: training starts close to signs alone.
    """

    bias: bool = True
    residual_std: float = 0.02


class CrossAttention(Fusion):
    """Add to every sign token what multi-head softmax attention finds in the question.

    Tokens stay as many as the clip has. A sample without a question is passed on unchanged, exactly.

    Call: as all fusions; returns tokens (B, Lv, d), the sign mask, and the attention (B, h, Lv, Lq), which is 0 at
    padded question tokens and throughout a sample without a question; rows of padded signs are not zeroed.

    Args:
        dim: width d of tokens.
        num_heads: attention heads h; must divide ``dim``.
        bias: whether the projections have a bias.
        residual_std: initial spread of ``out_proj``.

    Source:
        SSL-SSAW (arXiv 2509.14036), our reading, section 5 (baseline).
    """

    def __init__(self, dim: int, num_heads: int, bias: bool = True, residual_std: float = 0.02) -> None:
        super().__init__(dim, num_heads)
        self.config = CrossAttentionConfig(bias, residual_std)
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim, bias=bias)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            init.xavier_uniform_(layer.weight)
            if bias:
                init.zeros_(layer.bias)
        init.normal_(self.out_proj.weight, std=residual_std)

    def fuse(self, question: Tensor, question_mask: Tensor, sign: Tensor, sign_mask: Tensor) -> FusionOutput:
        """Sign tokens with the question added; shapes in the class docstring."""
        question = question.masked_fill(~question_mask[..., None], 0.0)
        sign = sign.masked_fill(~sign_mask[..., None], 0.0)
        q = split_heads(self.q_proj(sign), self.num_heads)
        k, v = (split_heads(proj(question), self.num_heads) for proj in (self.k_proj, self.v_proj))
        with torch.autocast(device_type=sign.device.type, enabled=False):
            q, k, v = at_least_float32(q), at_least_float32(k), at_least_float32(v)
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            # A finite floor instead of -inf: a row without a question stays finite and is zeroed below.
            absent = ~question_mask[:, None, None, :]
            weights = scores.masked_fill(absent, -1e30).softmax(dim=-1).masked_fill(absent, 0.0)
            attended = merge_heads(weights @ v)
        added = self.out_proj(attended.to(self.out_proj.weight.dtype))
        asked = question_mask.any(dim=1)[:, None] & sign_mask
        return sign + added.masked_fill(~asked[..., None], 0.0), sign_mask, weights
