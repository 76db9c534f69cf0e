"""Control: no image token is left; the floor that any method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from polymodal.errors import UserError

from vlm_accel.methods.base import Reduced, ScoreKind, TokenMethod, Tokens
from vlm_accel.schedule import Schedule, Step

__all__ = ["TextOnly"]


@dataclass(frozen=True)
class TextOnly(TokenMethod):
    """Deletes all image tokens at a decoder layer. The amount of a step is not read, only its layer.

    Args:
        layer: where they go when no schedule is given, from 1. Earlier layers have put into the text what they could.

    Source: control of LightVLM and iLLaVA (arXiv 2509.00419, 2412.06263; LightVLM 5, "text-only").
    """

    stages: ClassVar[tuple[str, ...]] = ("llm",)
    may_empty: ClassVar[bool] = True

    layer: int = 2

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise UserError(f"text_only: layer={self.layer}; expected a decoder layer from 1")

    def schedule(self) -> Schedule:
        """One step at ``layer``."""
        return [Step("llm", self.layer, keep=1)]

    def score(self, stage: str) -> ScoreKind:
        """None is needed."""
        return "none"

    def left(self, step: Step, tokens: int, group: int = 1) -> int:
        """Always 0."""
        return 0

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Delete all rows."""
        s, n = tokens.x.shape[:2]
        rows = torch.empty(s, 0, dtype=torch.int64, device=tokens.x.device)
        nowhere = torch.full((s, n), -1, dtype=torch.int64, device=tokens.x.device) if tokens.trace else None
        sizes = None if tokens.sizes is None else tokens.sizes[:, :0]
        return Reduced(x=tokens.x[:, :0], kept=rows, sizes=sizes, assign=nowhere)
