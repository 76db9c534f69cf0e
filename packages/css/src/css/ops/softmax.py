"""Cross-entropy of networks whose classes compete, with a background that may stand for several channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from css.ops.precision import at_least_float32
from css.task import IGNORE

__all__ = ["softmax_loss"]


def softmax_loss(logits: Tensor, labels: Tensor, background: int = 1, factor: Tensor | None = None) -> Tensor:
    """Cross-entropy in which the first ``background`` channels are one class, a mean over all pixels.

    With p the softmax of the logits, a pixel of a class at or above ``background`` costs -log p_y, every other one
    -log sum_{c < background} p_c. Ignored pixels (255) cost nothing but count in the mean. With ``background=1`` this
    is plain cross-entropy. Computed in float32 at least.

    Args:
        logits: (batch, S, H, W).
        labels: (batch, H, W), channels or 255.
        background: T, leading channels that together are the background, 1..S.
        factor: (batch,) weight of each picture, or None.

    Returns:
        Scalar.

    Source: unbiased cross-entropy of Cermelli et al. 2020 (MiB), arXiv 2002.00718; the mean is over all pixels there
    too.
    """
    logits = at_least_float32(logits)
    if background > 1:
        old, new = torch.split(logits, [background, logits.shape[1] - background], 1)
        # a channel whose logit is the log of a sum of exponentials has the mass of the sum
        logits = torch.cat([old.logsumexp(1, keepdim=True), new], 1)
        labels = torch.where(labels == IGNORE, IGNORE, (labels - background + 1).clamp(min=0))
    loss = cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    if factor is not None:
        loss = loss * factor.to(loss.dtype)[:, None, None]
    return loss.mean()
