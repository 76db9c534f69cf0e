"""SSUL: nothing old is trained again; new classes start from what "unknown object" has learnt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from css.data.batch import Batch
from css.methods.base import Method, StepContext
from css.models.base import Output
from css.ops.labels import one_hot, pseudo_label
from css.ops.losses import soft_binary_loss
from css.task import BACKGROUND

__all__ = ["SSUL"]


class SSUL(Method):
    """Binary cross-entropy with a class "unknown", pseudo-labels, and a frozen network in later steps.

    Background inside a saliency map is "unknown": an object of some other step. In later steps backbone, neck and the
    heads of old classes are frozen; the newest head and "unknown" are trained, and the background at a much smaller
    rate. The newest head starts as "unknown". Where the loader has no saliency maps, "unknown" has no positives: it
    learns to be off everywhere, and new classes start as absent, as DKD's do.

    Args:
        threshold: least sigmoid of the old network that makes a pseudo-label; above 1 there are none.
        background_factor: rate of the background head in later steps, in rates of the newest head.

    Source: our reading of Cha et al. 2021, arXiv 2106.11562; loss, freezing and start of heads as in the released code.
    Deviations: a class is predicted where its sigmoid is above 0.5, as in all sigmoid methods here (there the largest
    sigmoid wins, background's and unknown's added up); normalisation layers of the newest head keep the statistics of
    "unknown"; saliency maps may be missing.
    """

    head = "ssul"
    unknown = True
    detach_background = False

    def __init__(self, threshold: float = 0.7, background_factor: float = 1e-4) -> None:
        self.threshold, self.background_factor = threshold, background_factor

    @torch.no_grad()
    def init_new_head(self, ctx: StepContext) -> None:
        """Each new class starts as "unknown"."""
        from css.models.heads import from_unknown

        from_unknown(ctx.net)

    def trainable(self, ctx: StepContext) -> dict[nn.Parameter, float]:
        """All but the newest head and "unknown" is frozen, the background nearly so; step 0 trains everything."""
        if ctx.step == 0:
            return {}
        frozen = [ctx.net.extractor, *ctx.net.heads[1:-1]]
        factors = {parameter: 0.0 for module in frozen for parameter in module.parameters()}
        return factors | {parameter: self.background_factor for parameter in ctx.net.heads[0].parameters()}

    def loss(self, ctx: StepContext, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """``soft_binary_loss`` over all channels and "unknown", against completed labels."""
        labels = batch.labels
        if ctx.old is not None:
            labels = pseudo_label(labels, self._old_logits(ctx, batch.images), self.threshold)
        output: Output = ctx.net(batch.images)
        assert output.unknown is not None  # the network is built with unknown=True
        joined = torch.cat([output.logits, output.unknown], 1)
        logits = ctx.net.upsample(joined, batch.images.shape[-2:])
        target = one_hot(labels, logits.shape[1])
        if batch.saliency is not None:
            unknown = (labels == BACKGROUND) & batch.saliency
            target[:, 0].masked_fill_(unknown, 0.0)
            target[:, -1] = unknown
        loss = soft_binary_loss(logits, target)
        return loss, {"bce": loss.detach()}

    @torch.no_grad()
    def _old_logits(self, ctx: StepContext, images: Tensor) -> Tensor:
        """Logits of the old network where "unknown" counts as background: neither makes a pseudo-label."""
        output: Output = ctx.teacher(images)
        assert output.unknown is not None
        # Joined anew, so that writing into the result touches nothing of the network.
        logits = ctx.teacher.upsample(torch.cat([output.unknown, output.logits], 1), images.shape[-2:])
        torch.maximum(logits[:, 0], logits[:, 1], out=logits[:, 1])
        return logits[:, 1:]
