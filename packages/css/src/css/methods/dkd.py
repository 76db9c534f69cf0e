"""DKD: the old network's reasons for and against a class are distilled apart."""

from __future__ import annotations

import torch
from torch import Tensor

from css.data.batch import Batch
from css.methods.base import Method, StepContext
from css.models.base import Output
from css.ops.decomposed import class_targets, classwise_bce, decompose, distil_binary
from css.task import IGNORE

__all__ = ["DKD"]


class DKD(Method):
    """Binary cross-entropy on the step's own classes, and distillation of old logits and of their two parts.

    A logit of a linear head is positive reasoning (products with positive weights) plus negative reasoning (with
    negative weights) plus a bias. Channel 0 is an auxiliary unit that learns to be off everywhere, on features without
    gradient, and that new heads start from. Every term is a mean over batch and pixels by class, then a sum over
    classes. Step 0 has the first and the last term alone.

    Args:
        pos_weight: weight of positives in step 0 (VOC 2, ADE20K 35).
        later_pos_weight: the same in later steps (VOC 1, ADE20K 35).
        logits: weight of the distillation of old logits.
        positive: weight of the distillation of positive reasoning.
        negative: weight of the distillation of negative reasoning.
        auxiliary: weight of the auxiliary unit.

    Source: Baek et al. 2022 (NeurIPS), arXiv 2210.05941, and the released code. Deviation: ignored pixels (255) are
    left out of the first and the last term, where the code counts them as negatives.
    """

    def __init__(
        self,
        pos_weight: float = 2.0,
        later_pos_weight: float = 1.0,
        logits: float = 5.0,
        positive: float = 5.0,
        negative: float = 5.0,
        auxiliary: float = 1.0,
    ) -> None:
        self.pos_weight, self.later_pos_weight = pos_weight, later_pos_weight
        self.logits, self.positive, self.negative, self.auxiliary = logits, positive, negative, auxiliary

    def loss(self, ctx: StepContext, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the terms."""
        output: Output = ctx.net(batch.images)
        logits = ctx.net.upsample(output.logits, batch.images.shape[-2:])
        # One split, and not three slices: each slice would have a gradient of the size of all logits.
        background, old_classes, own = torch.split(logits, [1, ctx.num_old, ctx.num_new], 1)
        valid = batch.labels != IGNORE
        target = class_targets(batch.labels, 1 + ctx.num_old, ctx.num_new)
        pos_weight = self.later_pos_weight if ctx.old is not None else self.pos_weight
        terms = {"bce": classwise_bce(own, target, pos_weight, valid)}
        weights = {"bce": 1.0, "ac": self.auxiliary}
        if self.auxiliary:
            terms["ac"] = classwise_bce(background, torch.zeros_like(background), valid=valid)
        if ctx.old is not None:
            terms |= self._distillation(ctx, batch.images, output, old_classes)
            weights |= {"kd": self.logits, "pos": self.positive, "neg": self.negative}
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return loss, {name: term.detach() for name, term in terms.items()}

    def _distillation(self, ctx: StepContext, images: Tensor, output: Output, logits: Tensor) -> dict[str, Tensor]:
        """Terms of old classes, whose ``logits`` are given at image size; those with weight 0 are left out."""
        terms: dict[str, Tensor] = {}
        with torch.no_grad():
            old: Output = ctx.teacher(images)
        if self.logits:
            old_logits = ctx.teacher.upsample(old.logits[:, 1:], images.shape[-2:])
            terms["kd"] = distil_binary(logits, old_logits)
        if self.positive or self.negative:
            old_parts = decompose(old.feature, ctx.teacher.class_weights()[1:])
            parts = decompose(output.feature, ctx.net.class_weights()[1 : 1 + ctx.num_old])
            for name, weight, new_part, old_part in zip(
                ("pos", "neg"), (self.positive, self.negative), parts, old_parts, strict=True
            ):
                if weight:
                    terms[name] = distil_binary(new_part, old_part.detach())
        return terms
