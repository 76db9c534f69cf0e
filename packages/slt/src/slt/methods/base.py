"""What every fusion shares: its call, the checks of its arguments, and how a constructor's options are kept."""

from __future__ import annotations

from typing import Any

import torch
from polymodal.errors import UserError
from torch import Tensor, nn

__all__ = ["Fusion", "FusionOutput"]

FusionOutput = tuple[Tensor, Tensor, Tensor | None]


class Fusion(nn.Module):
    """Base of all fusions: ``(question, question_mask, sign, sign_mask) -> (tokens, mask, weights or None)``.

    Subclasses fill in ``fuse`` and keep their frozen hyper-parameters in ``config``. What they promise, and what the
    contract tests hold them to: padded content (NaN too) changes no valid output and gets no gradient, tokens at padded
    positions are 0, samples of a batch do not touch each other, Lq = 0 works, and no row yields NaN, not even one
    without a valid token.

    Args:
        dim: width d of tokens.
        num_heads: attention heads; must divide ``dim`` (also where a method has no attention, so that methods can be
            exchanged).

    Raises:
        UserError: ``dim`` is not a positive multiple of ``num_heads``.
    """

    config: Any

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise UserError(
                f"dim={dim} with num_heads={num_heads}; expected dim to be a positive multiple of num_heads"
            )
        self.dim = dim
        self.num_heads = num_heads

    def forward(self, question: Tensor, question_mask: Tensor, sign: Tensor, sign_mask: Tensor) -> FusionOutput:
        """Fuse one batch.

        Args:
            question: (B, Lq, d) states of the question's tokens; Lq = 0 is a batch without questions.
            question_mask: (B, Lq) bool, True = valid; a row of False is a sample without a question.
            sign: (B, Lv, d) visual tokens.
            sign_mask: (B, Lv) bool, True = valid.

        Returns:
            ``(tokens, mask, weights)``: (B, L, d) with 0 at padding, in the type of the inputs; (B, L) bool; and
            whatever weights the method can show, or ``None``.

        Raises:
            ValueError: wrong shape or type.
        """
        self._check("question", question, question_mask)
        self._check("sign", sign, sign_mask)
        if question.shape[0] != sign.shape[0]:
            raise ValueError(f"{question.shape[0]} questions with {sign.shape[0]} clips; expected equal batch sizes")
        tokens, mask, weights = self.fuse(question, question_mask, sign, sign_mask)
        return tokens.to(torch.promote_types(question.dtype, sign.dtype)), mask, weights

    def fuse(self, question: Tensor, question_mask: Tensor, sign: Tensor, sign_mask: Tensor) -> FusionOutput:
        """The method itself; arguments are checked. Shapes as in ``forward``."""
        raise NotImplementedError(f"{type(self).__name__} does not fill in fuse()")

    def extra_repr(self) -> str:
        """Width, heads and options, for ``print(module)``."""
        return f"dim={self.dim}, num_heads={self.num_heads}, {self.config}"

    def _check(self, name: str, tokens: Tensor, mask: Tensor) -> None:
        if tokens.ndim != 3 or tokens.shape[-1] != self.dim:
            raise ValueError(f"{name} has shape {tuple(tokens.shape)}; expected (batch, tokens, {self.dim})")
        if mask.shape != tokens.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"{name}_mask is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of shape "
                f"{tuple(tokens.shape[:2])}, True = valid (mask.bool() converts a 0/1 mask)"
            )
