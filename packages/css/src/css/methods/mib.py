"""Modelling the background: one softmax in which "background" means something else in each step."""

from __future__ import annotations

import torch
from torch import Tensor

from css.data.batch import Batch
from css.methods.base import Method, StepContext
from css.ops.distill import region_distillation
from css.ops.softmax import softmax_loss

__all__ = ["MiB"]


class MiB(Method):
    """Unbiased cross-entropy and unbiased distillation.

    Annotated "background" may be any old class, so that the loss takes the mass of background and old classes together
    there. The old network's "background" may be any new class, so that distillation takes the mass of background and
    new classes together. New heads share the background's probability at the start. Step 0 is plain cross-entropy;
    with ``distillation=0`` the second term is gone.

    Args:
        distillation: weight of the distillation. 10 in the paper; the authors use 100 for VOC 15-1 (their issue 22).

    Source: Cermelli et al. 2020, arXiv 2002.00718: cross-entropy, distillation and start of classifiers, all three
    "revisited" for the background. Means over all pixels, and in the distillation over the old channels, as there.
    """

    softmax = True
    detach_background = False

    def __init__(self, distillation: float = 10.0) -> None:
        self.distillation = distillation

    @torch.no_grad()
    def init_new_head(self, ctx: StepContext) -> None:
        """Background and new classes share what the background had."""
        from css.models.heads import balanced_bias

        balanced_bias(ctx.net)

    def loss(self, ctx: StepContext, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy with a merged background, and distillation in later steps."""
        logits = ctx.net.full_logits(batch.images)
        loss = softmax_loss(logits, batch.labels, 1 + ctx.num_old)
        terms = {"ce": loss.detach()}
        if ctx.old is not None and self.distillation:
            kd = region_distillation(logits, ctx.old_logits(batch.images), batch.labels, variant="mib")
            terms["kd"] = kd.detach()
            loss = loss + self.distillation * kd
        return loss, terms
