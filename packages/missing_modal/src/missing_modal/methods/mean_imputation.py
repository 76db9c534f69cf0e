"""A missing modality gets the mean feature of the training samples that have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from polymodal.errors import UserError
from torch import Tensor

from missing_modal.methods.base import Context, Method, Prompter

__all__ = ["MeanImputation"]


@dataclass(frozen=True)
class MeanImputation(Method):
    """Frozen features; where a modality is missing, the training set's mean feature of it.

    Norms and projections stay frozen: were they trained, the means would have to be taken anew at each step.

    Source: Hu et al. 2024 (arXiv 2410.06558) is what it is compared with; that the mean is taken over the training
    samples which have the modality, of features, is our reading.
    """

    def build(self, context: Context) -> Prompter:
        """Nothing trained but the head; ``Classifier.prepare`` fits the means."""
        return _Means(context)


class _Means(Prompter):
    wants_means: ClassVar[bool] = True

    def __init__(self, context: Context) -> None:
        super().__init__(context, train_out=False)
        #: of each tower, and whether they were set
        self.means: Tensor
        self.fitted: Tensor
        self.register_buffer("means", torch.zeros(sum(tower.features for tower in context.towers)))
        self.register_buffer("fitted", torch.tensor(False))

    def set_means(self, means: Sequence[Tensor]) -> None:
        """Keep the means."""
        self.means.copy_(torch.cat(list(means)))
        self.fitted.fill_(True)

    def fuse(self, features: Mapping[int, Tensor], rows: Mapping[int, Tensor], masks: Sequence[int]) -> Tensor:
        """Features, means where a modality is missing.

        Raises:
            UserError: something is missing, and the means are not there.
        """
        full = 2 ** len(self.context.towers) - 1
        if any(mask != full for mask in masks) and not self.fitted:
            raise UserError("mean_imputation has no mean features yet; call Classifier.prepare on the training batches")
        fused = super().fuse(features, rows, masks)
        lacks = torch.tensor(
            [[not mask >> place & 1 for place in range(len(self.context.towers))] for mask in masks],
            device=fused.device,
        )
        sizes = torch.tensor([tower.features for tower in self.context.towers], device=fused.device)
        return torch.where(lacks.repeat_interleave(sizes, dim=1), self.means.to(fused.dtype), fused)
