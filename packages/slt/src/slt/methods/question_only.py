"""Question tokens alone: what can be said without looking at the video."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slt.methods.base import Fusion, FusionOutput

__all__ = ["QuestionOnly", "QuestionOnlyConfig"]


@dataclass(frozen=True)
class QuestionOnlyConfig:
    """``QuestionOnly`` has no hyper-parameters."""


class QuestionOnly(Fusion):
    """Pass the question tokens on and ignore the video: the audit's trained baseline for leaking questions.

    Call: as all fusions; returns tokens (B, Lq, d), the question mask, no weights. No parameters. A sample without a
    question comes back as a row without a valid token (and Lq = 0 as no tokens at all): the caller's encoder has to
    bear that.

    Args:
        dim: width d of tokens.
        num_heads: not used; checked so that fusions can be exchanged.

    Source:
        SSL-SSAW (arXiv 2509.14036), our reading, sections 3.4 and 4.3.
    """

    def __init__(self, dim: int, num_heads: int = 1) -> None:
        super().__init__(dim, num_heads)
        self.config = QuestionOnlyConfig()

    def fuse(self, question: Tensor, question_mask: Tensor, sign: Tensor, sign_mask: Tensor) -> FusionOutput:
        """The question tokens, 0 at padding."""
        return question.masked_fill(~question_mask[..., None], 0.0), question_mask, None
