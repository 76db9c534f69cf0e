"""The floor: frozen towers and a linear head."""

from __future__ import annotations

from dataclasses import dataclass

from missing_modal.methods.base import Context, Method, Prompter

__all__ = ["HeadOnly"]


@dataclass(frozen=True)
class HeadOnly(Method):
    """No prompts; a missing modality's feature is zero.

    Args:
        train_out: also train copies of the last norms and of the image projection. The paper's figures do not say which
            of the two their "Baseline" is: report both (DCP 7.6).

    Source: Hu et al. 2024 (arXiv 2410.06558), "Baseline" of the figures.
    """

    train_out: bool = False

    def build(self, context: Context) -> Prompter:
        """Norms and projections only."""
        return Prompter(context, self.train_out)
