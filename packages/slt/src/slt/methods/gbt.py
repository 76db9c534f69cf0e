"""GBT-style gated fusion of sign tokens with the question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import init

from slt.methods.base import Fusion, FusionOutput
from slt.ops.contrastive import masked_mean
from slt.ops.precision import at_least_float32

__all__ = ["GatedFusion", "GatedFusionConfig"]


@dataclass(frozen=True)
class GatedFusionConfig:
    """Hyper-parameters of ``GatedFusion``.

    Args:
        gate_bias: initial bias of the gate f; 0 starts half open.
    """

    gate_bias: float = 0.0


class GatedFusion(Fusion):
    """f = sigmoid(W_f a + U_f b); out = f * (W a + U b) + (1 - f) * a, with a the signs and b the question.

    Signs and questions differ in length, and the formula wants one b for each a. Our decision: b is the mean of the
    question's valid tokens, the same for every sign token (the baseline's triplet loss uses time means, too). A sample
    without a question has no b and is passed on unchanged. W_f and W carry the only biases.

    Call: as all fusions; returns tokens (B, Lv, d), the sign mask, and f (B, Lv, d), 0 at padding and throughout a
    sample without a question.

    Args:
        dim: width d of tokens.
        num_heads: not used; checked so that fusions can be exchanged.
        gate_bias: initial bias of the gate.

    Source:
        Gao et al. 2024 through SSL-SSAW (arXiv 2509.14036), our reading, section 5. GBT's gloss losses are left out.
    """

    def __init__(self, dim: int, num_heads: int = 1, gate_bias: float = 0.0) -> None:
        super().__init__(dim, num_heads)
        self.config = GatedFusionConfig(gate_bias)
        self.sign_gate = nn.Linear(dim, dim)
        self.question_gate = nn.Linear(dim, dim, bias=False)
        self.sign_proj = nn.Linear(dim, dim)
        self.question_proj = nn.Linear(dim, dim, bias=False)
        for layer in (self.sign_gate, self.question_gate, self.sign_proj, self.question_proj):
            init.xavier_uniform_(layer.weight)
        init.constant_(self.sign_gate.bias, gate_bias)
        init.zeros_(self.sign_proj.bias)

    def fuse(self, question: Tensor, question_mask: Tensor, sign: Tensor, sign_mask: Tensor) -> FusionOutput:
        """Gated sign tokens; shapes in the class docstring."""
        sign = sign.masked_fill(~sign_mask[..., None], 0.0)
        mean = masked_mean(question, question_mask)[:, None]
        logits = self.sign_gate(sign) + self.question_gate(mean)
        gate = torch.sigmoid(at_least_float32(logits))
        gate = gate.masked_fill(~(question_mask.any(dim=1)[:, None] & sign_mask)[..., None], 0.0)
        mixed = self.sign_proj(sign) + self.question_proj(mean)
        return gate * mixed + (1.0 - gate) * sign, sign_mask, gate
