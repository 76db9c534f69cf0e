"""Context optimisation: agnostic rows in front of the text only."""

from __future__ import annotations

from dataclasses import dataclass

from missing_modal.methods._rows import reach_of
from missing_modal.methods.base import Context, Method, Prompter
from missing_modal.methods.deep_prompts import AgnosticPrompter

__all__ = ["CoOp"]


@dataclass(frozen=True)
class CoOp(Method):
    """Learned context in front of the text, at block 0 only.

    Args:
        length: L (16 in CoOp; 36 here, as the other methods have it).
        tower: which tower.
        train_out: train what DCP trains besides prompts, so that only the prompts differ.

    Source: Zhou et al. 2022 (arXiv 2109.01134), unified context, in front of the sample's text in place of class names,
    with DCP's head (our reading). Deviation: rows in front of the start token, not behind it.
    """

    length: int = 36
    tower: str = "text"
    train_out: bool = True

    def build(self, context: Context) -> Prompter:
        """Rows of one tower at block 0."""
        return AgnosticPrompter(context, self.length, reach_of(context, 1, (self.tower,)), self.train_out, "coop")
