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
    if background == 1:
        loss = cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    else:
        loss = _merged(logits, labels, background)
    if factor is not None:
        loss = loss * factor.to(loss.dtype)[:, None, None]
    return loss.mean()


def _merged(logits: Tensor, labels: Tensor, background: int) -> Tensor:
    """(batch, H, W) loss without a tensor of merged log-probabilities: only maps of one channel are made."""
    valid = labels != IGNORE
    new = valid & (labels >= background)
    merged = logits[:, :background].logsumexp(1)
    # the class of a pixel that is no new class does not matter: its value is not taken
    chosen = logits.gather(1, (labels * new).unsqueeze(1)).squeeze(1)
    loss = logits.logsumexp(1) - torch.where(new, chosen, merged)
    return loss.masked_fill(~valid, 0.0)
