"""Question and sign tokens one after the other, without weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slt.methods.base import Fusion, FusionOutput
from slt.ops.ssaw import join_tokens

__all__ = ["Concat", "ConcatConfig"]


@dataclass(frozen=True)
class ConcatConfig:
    """Hyper-parameters of ``Concat``.

    Args:
        type_std: standard deviation of the initial type vectors.
    """

    type_std: float = 0.02


class Concat(Fusion):
    """Tokens of both modalities plus their type vectors, question first: SSAW with every weight equal to 1.

    Call: as all fusions; returns tokens (B, Lq+Lv, d), mask (B, Lq+Lv), no weights.

    Args:
        dim: width d of tokens.
        num_heads: not used; checked so that fusions can be exchanged.
        type_std: initial spread of the type vectors.

    Source:
        SSL-SSAW (arXiv 2509.14036), our reading, sections 3.4 and 5.
    """

    def __init__(self, dim: int, num_heads: int = 1, type_std: float = 0.02) -> None:
        super().__init__(dim, num_heads)
        self.config = ConcatConfig(type_std)
        self.type_embedding = nn.Parameter(torch.randn(2, dim) * type_std)

    def fuse(self, question: Tensor, question_mask: Tensor, sign: Tensor, sign_mask: Tensor) -> FusionOutput:
        """The joined tokens; shapes in the class docstring."""
        return *join_tokens(question, question_mask, sign, sign_mask, self.type_embedding), None
