"""A missing modality stays in: its placeholder is encoded like any input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from missing_modal.methods.base import Context, Method, Prompter

__all__ = ["ZeroImputation"]


@dataclass(frozen=True)
class ZeroImputation(Method):
    """Empty text, constant image: the frozen tower's feature of the placeholder takes the missing one's place.

    Args:
        train_out: also train copies of the last norms and of the image projection.

    Source: Hu et al. 2024 (arXiv 2410.06558) use these placeholders, and set the feature to zero; keeping it is the
    usual imputation that DCP is compared with (our reading).
    """

    train_out: bool = False

    def build(self, context: Context) -> Prompter:
        """Nothing but norms and projections; the towers of missing modalities run."""
        return _Placeholders(context, self.train_out)


class _Placeholders(Prompter):
    encodes_missing: ClassVar[bool] = True
