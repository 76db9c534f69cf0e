"""Pseudo-labels: background pixels in which the old network is sure of an old class get that class."""

from __future__ import annotations

import torch
from torch import Tensor

from css.data.batch import Batch
from css.methods.base import StepContext
from css.methods.ft import FineTuning
from css.ops.labels import one_hot, pseudo_label
from css.ops.losses import soft_binary_loss

__all__ = ["PseudoLabels"]


class PseudoLabels(FineTuning):
    """Fine-tuning on labels that the old network has completed; with a threshold above 1 it is fine-tuning.

    Args:
        threshold: least sigmoid of the old network that makes a pseudo-label.
        init: as in ``FineTuning``.
        init_bias: as in ``FineTuning``.

    Source: Yin et al. 2025, arXiv 2503.22136 (released code, step 1 of a batch), and before it SSUL; no other part.
    """

    def __init__(self, threshold: float = 0.7, init: str = "background", init_bias: float = -4.0) -> None:
        super().__init__(init, init_bias)
        self.threshold = threshold

    def loss(self, ctx: StepContext, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """``soft_binary_loss`` against completed labels."""
        if ctx.old is None:
            return super().loss(ctx, batch, generator)
        labels = pseudo_label(batch.labels, ctx.old_logits(batch.images), self.threshold)
        logits = ctx.net.full_logits(batch.images)
        loss = soft_binary_loss(logits, one_hot(labels, logits.shape[1]))
        return loss, {"bce": loss.detach()}
