"""PLOP: features held in place at several scales, and pseudo-labels where the old network is surer than usual."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from polymodal.errors import UserError
from torch import Tensor

from css.data.batch import Batch
from css.methods.base import Method, StepContext
from css.models.base import Output
from css.ops.entropy import entropy_histogram, entropy_pseudo_label, median_thresholds, normalised_entropy
from css.ops.pod import fold_new, pod_distance
from css.ops.softmax import softmax_loss
from css.task import BACKGROUND

__all__ = ["PLOP"]


class PLOP(Method):
    """Local POD on the backbone's stages and on the logits, cross-entropy on labels completed by entropy.

    Before a later step the old network looks at its pictures once: the median entropy with which it predicts a class on
    background pixels is that class's threshold. In training, a pixel without a class of the step gets the old
    network's class where its entropy is below the threshold, and is ignored elsewhere; each picture's loss is
    multiplied by the share of such pixels that were kept. Step 0 is plain cross-entropy.

    Args:
        pod: weight of the stages' distances; 0 switches the whole distillation off.
        pod_logits: weight of the logits' distance (0.0005; ADE20K 0.00001).
        scales: tiles a side in Local POD.
        floor: least threshold of entropy.
        bins: bins of the histogram that the medians come from.

    Raises:
        UserError: no bin, or no scale.

    Source: Douillard et al. 2021, arXiv 2011.11390, Local POD and pseudo-labels by entropy; factors of the released
    code, whose square root of seen over new classes counts the background as seen. Deviations from the code: entropy is
    the sum over classes divided by log T (there a mean over classes, divided twice), a median is placed in its bin by
    its rank (there by a sum of bin numbers), and a picture without background keeps its loss (there 0/0).
    """

    softmax = True
    detach_background = False

    def __init__(
        self,
        pod: float = 0.01,
        pod_logits: float = 0.0005,
        scales: Sequence[int] = (1, 2, 4),
        floor: float = 0.001,
        bins: int = 100,
    ) -> None:
        if bins < 1 or not scales or min(scales) < 1:
            raise UserError(f"bins={bins}, scales={list(scales)}; expected at least one bin and one scale, from 1 on")
        self.pod, self.pod_logits, self.scales = pod, pod_logits, tuple(scales)
        self.floor, self.bins = floor, bins
        self.thresholds: Tensor | None = None

    @torch.no_grad()
    def init_new_head(self, ctx: StepContext) -> None:
        """As MiB: background and new classes share what the background had."""
        from css.models.heads import balanced_bias

        balanced_bias(ctx.net)

    @torch.no_grad()
    def prepare(self, ctx: StepContext, batches: Iterable[Batch]) -> None:
        """Median entropy of each old channel over the background of the step's pictures, in one pass."""
        self.thresholds = None
        if ctx.old is None:
            return
        channels = 1 + ctx.num_old
        device = next(ctx.old.parameters()).device
        histogram = torch.zeros(channels, self.bins, dtype=torch.int64, device=device)
        for batch in batches:
            batch = batch.to(device)
            entropy, classes = normalised_entropy(ctx.old_logits(batch.images))
            histogram += entropy_histogram(entropy, classes, batch.labels == BACKGROUND, channels, self.bins)
        self.thresholds = median_thresholds(histogram, self.floor).to(device)

    def loss(self, ctx: StepContext, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy on completed labels, and Local POD in later steps.

        Raises:
            RuntimeError: a later step without ``prepare``.
        """
        new: Output = ctx.net(batch.images)
        size = batch.images.shape[-2:]
        logits = ctx.net.upsample(new.logits, size)
        if ctx.old is None:
            loss = softmax_loss(logits, batch.labels)
            return loss, {"ce": loss.detach()}
        if self.thresholds is None:
            raise RuntimeError("PLOP.prepare has to look at the step's pictures before the first loss of a later step")
        with torch.no_grad():
            old: Output = ctx.old(batch.images)
            labels, factor = entropy_pseudo_label(batch.labels, ctx.old.upsample(old.logits, size), self.thresholds)
        loss = softmax_loss(logits, labels, factor=factor)
        terms = {"ce": loss.detach()}
        if self.pod:
            pod = self._distance(ctx, new, old)
            terms["pod"] = pod.detach()
            loss = loss + pod
        return loss, terms

    def _distance(self, ctx: StepContext, new: Output, old: Output) -> Tensor:
        """Mean over layers of the weighted distances, larger where few classes are new."""
        distances = [self.pod * pod_distance(a, b, self.scales) for a, b in zip(new.stages, old.stages, strict=True)]
        folded = fold_new(new.logits, old.logits.shape[1])
        distances.append(self.pod_logits * pod_distance(folded, old.logits, self.scales))
        return torch.stack(distances).mean() * math.sqrt((1 + ctx.num_old + ctx.num_new) / ctx.num_new)
