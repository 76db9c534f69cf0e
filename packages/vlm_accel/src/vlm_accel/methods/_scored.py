"""What methods that rank tokens by attention share: which score they rank by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from polymodal.errors import UserError

from vlm_accel.methods.base import ScoreKind, TokenMethod

__all__ = ["ScoredMethod", "one_of"]

VisionScore = Literal["received", "cls", "lse"]
LLMScore = Literal["last", "self", "text", "received"]


def one_of(what: str, value: object, allowed: tuple[str, ...]) -> None:
    """UserError unless ``value`` is allowed."""
    if value not in allowed:
        raise UserError(f"{what}={value!r}; use one of {', '.join(allowed)}")


@dataclass(frozen=True)
class ScoredMethod(TokenMethod):
    """Ranks by an importance score.

    Args:
        vision_score: in encoders: ``received`` attention, ``cls`` (attention of the CLS row), ``lse`` (parity with the
            released Qwen code only, which ranks by a property of the queries; iLLaVA 3.2).
        llm_score: in decoders: attention of the ``last`` prompt token in the layer before, ``self`` the same with the
            step's own layer, ``text`` the mean over the text after the last image, ``received`` (LightVLM 3.3).

    Raises:
        UserError: an unknown score.
    """

    vision_score: VisionScore = "received"
    llm_score: LLMScore = "last"

    def __post_init__(self) -> None:
        one_of("vision_score", self.vision_score, get_args(VisionScore))
        one_of("llm_score", self.llm_score, get_args(LLMScore))

    def score(self, stage: str) -> ScoreKind:
        """The score chosen for ``stage``."""
        return self.vision_score if stage == "vision" else self.llm_score
