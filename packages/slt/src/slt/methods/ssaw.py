"""Sigmoid self-attention weighting of question and sign tokens (our reading of SSL-SSAW)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from polymodal.errors import UserError
from torch import Tensor, nn
from torch.nn import init

from slt.methods.base import Fusion, FusionOutput
from slt.ops import ssaw as ops

__all__ = ["SSAWConfig", "SigmoidSelfAttentionWeighting"]

_MODES = ("gate", "attention")
_GRANULARITIES = ("channel", "token")


@dataclass(frozen=True)
class SSAWConfig:
    """Hyper-parameters of ``SigmoidSelfAttentionWeighting``; defaults are ours (specification, section 3.4).

    Args:
        mode: ``gate`` (a sigmoid of the attended context weights the tokens) or ``attention`` (a sigmoid replaces the
            softmax inside attention).
        granularity: ``channel`` (a weight per token and channel) or ``token`` (a weight per token); gate mode only.
        gate_bias: initial bias of the gate; +1 starts close to "keep all" (sigmoid(1) = 0.73).
        gate_std: standard deviation of the gate's initial weights, zero-mean.
        type_std: standard deviation of the initial type vectors.
        residual_std: standard deviation of ``out_proj``'s initial weights in attention mode, so that training starts
            close to plain concatenation; with Xavier weights the mean of all tokens drowns each of them at first.
    """

    mode: str = "gate"
    granularity: str = "channel"
    gate_bias: float = 1.0
    gate_std: float = 0.02
    type_std: float = 0.02
    residual_std: float = 0.02

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise UserError(f"mode={self.mode!r}; expected one of {', '.join(_MODES)}")
        if self.granularity not in _GRANULARITIES:
            raise UserError(f"granularity={self.granularity!r}; expected one of {', '.join(_GRANULARITIES)}")


class SigmoidSelfAttentionWeighting(Fusion):
    """Weight question and sign tokens by a sigmoid of their joint self-attention.

    With Z the question and sign tokens one after the other, each plus its type vector, and m their mask:

    - ``mode="gate"``: H = softmax self-attention of Z; G = sigmoid(gate_proj(H)); out = G * Z * m. No residual, no
      layer norm: the output is a weighted copy of the input. Degenerate cases: gate weights 0 and bias 0 give Z/2,
      a large bias gives Z, which is ``concat``.
    - ``mode="attention"``: A_ij = sigmoid(S_ij - ln n) * m_j with n valid tokens in that sample;
      out = (Z + out_proj(A v)) * m.

    There is no positional encoding: permuting question tokens permutes the output. In attention mode ``gate_proj``
    exists but is frozen, so that checkpoints keep one layout and distributed training sees no unused parameter.

    Call: ``(question (B, Lq, d), question_mask, sign (B, Lv, d), sign_mask)`` -> ``(tokens (B, Lq+Lv, d), mask,
    weights)``. Weights: gate (B, L, d) or (B, L, 1), 0 at padding; attention (B, h, L, L), 0 at padded keys, rows of
    padded queries not zeroed.

    Args:
        dim: width d of tokens.
        num_heads: attention heads h; must divide ``dim``.
        mode: ``gate`` or ``attention``.
        granularity: ``channel`` or ``token``.
        gate_bias: initial bias of the gate.
        gate_std: initial spread of the gate's weights.
        type_std: initial spread of the type vectors.
        residual_std: initial spread of ``out_proj`` in attention mode.

    Raises:
        UserError: unknown mode or granularity, or heads that do not divide ``dim``.

    Source:
        SSL-SSAW (arXiv 2509.14036), our reading, section 3.4. The paper's equations could not be read: whether its
        sigmoid sits on the tokens or on the scores is not known, hence the two modes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mode: str = "gate",
        granularity: str = "channel",
        gate_bias: float = 1.0,
        gate_std: float = 0.02,
        type_std: float = 0.02,
        residual_std: float = 0.02,
    ) -> None:
        super().__init__(dim, num_heads)
        self.config = SSAWConfig(mode, granularity, gate_bias, gate_std, type_std, residual_std)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.gate_proj = nn.Linear(dim, dim if granularity == "channel" else 1)
        self.gate_proj.requires_grad_(mode == "gate")
        self.type_embedding = nn.Parameter(torch.empty(2, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial parameters: Xavier for the projections, a small gate or a small residual branch."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            init.xavier_uniform_(layer.weight)
            init.zeros_(layer.bias)
        if self.config.mode == "attention":
            init.normal_(self.out_proj.weight, std=self.config.residual_std)
        init.normal_(self.gate_proj.weight, std=self.config.gate_std)
        init.constant_(self.gate_proj.bias, self.config.gate_bias)
        init.normal_(self.type_embedding, std=self.config.type_std)

    def fuse(self, question: Tensor, question_mask: Tensor, sign: Tensor, sign_mask: Tensor) -> FusionOutput:
        """Weighted tokens of both modalities, question first; shapes in the class docstring."""
        tokens, mask = ops.join_tokens(question, question_mask, sign, sign_mask, self.type_embedding)
        q, k, v = (ops.split_heads(proj(tokens), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.mode == "gate":
            context = self._out(ops.softmax_context(q, k, v, mask))
            out, weights = ops.gate_tokens(tokens, self.gate_proj(context), mask)
        else:
            attended, weights = ops.sigmoid_attention(q, k, v, mask)
            out = (tokens + self._out(attended)).masked_fill(~mask[..., None], 0.0)
        return out, mask, weights

    def _out(self, heads: Tensor) -> Tensor:
        # The heads come in float32 at least; a model held in bfloat16 needs its own type back for the projection.
        projected: Tensor = self.out_proj(ops.merge_heads(heads).to(self.out_proj.weight.dtype))
        return projected
