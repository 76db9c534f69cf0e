"""Visual prompt tuning: agnostic rows in the image tower only."""

from __future__ import annotations

from dataclasses import dataclass

from missing_modal.methods._rows import reach_of
from missing_modal.methods.base import Context, Method, Prompter
from missing_modal.methods.deep_prompts import AgnosticPrompter

__all__ = ["VPT"]


@dataclass(frozen=True)
class VPT(Method):
    """Prompts in front of the image's tokens.

    Args:
        length: L.
        depth: J blocks with rows of their own (deep).
        deep: False puts rows in front of block 0 only, from where they flow on (shallow); ``depth`` has no part then.
        tower: which tower.
        train_out: train what DCP trains besides prompts, so that only the prompts differ.

    Source: Jia et al. 2022 (arXiv 2203.12119), VPT-deep and VPT-shallow. Beside a frozen text tower, with DCP's head,
    it is our reading. Deviation: N(0, 0.02^2) in place of Xavier-uniform, rows in front of the CLS.
    """

    length: int = 36
    depth: int = 6
    deep: bool = True
    tower: str = "image"
    train_out: bool = True

    def build(self, context: Context) -> Prompter:
        """Rows of one tower."""
        reach = reach_of(context, self.depth if self.deep else 1, (self.tower,))
        return AgnosticPrompter(context, self.length, reach, self.train_out, "vpt")
