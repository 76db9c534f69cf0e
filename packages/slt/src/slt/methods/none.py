"""Sign tokens alone: translation without a question."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slt.methods.base import Fusion, FusionOutput

__all__ = ["SignOnly", "SignOnlyConfig"]


@dataclass(frozen=True)
class SignOnlyConfig:
    """``SignOnly`` has no hyper-parameters."""


class SignOnly(Fusion):
    """Pass the sign tokens on and ignore the question, as gloss-free translation without questions does.

    Call: as all fusions; returns tokens (B, Lv, d), the sign mask, no weights. No parameters.

    Args:
        dim: width d of tokens.
        num_heads: not used; checked so that fusions can be exchanged.

    Source:
        GFSLT-VLP's input to its encoder; ``fusion="none"`` of SSL-SSAW (arXiv 2509.14036), our reading, section 3.4.
    """

    def __init__(self, dim: int, num_heads: int = 1) -> None:
        super().__init__(dim, num_heads)
        self.config = SignOnlyConfig()

    def fuse(self, question: Tensor, question_mask: Tensor, sign: Tensor, sign_mask: Tensor) -> FusionOutput:
        """The sign tokens, 0 at padding."""
        return sign.masked_fill(~sign_mask[..., None], 0.0), sign_mask, None
