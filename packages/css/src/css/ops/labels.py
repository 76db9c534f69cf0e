"""Labels of a later step: completed by what the old network is sure of, and as one row of targets a pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from css.ops.precision import at_least_float32
from css.task import BACKGROUND, IGNORE

__all__ = ["one_hot", "pseudo_label"]


@torch.no_grad()
def pseudo_label(labels: Tensor, old_logits: Tensor, threshold: float = 0.7) -> Tensor:
    """Write what the old network is sure of into the background.

    With (q, c) = max over all channels of sigmoid(old_logits), *background included*: a pixel labelled background
    becomes c where c > 0 and q >= threshold; every other pixel keeps its label (annotated classes, ignored pixels).

    Args:
        labels: (B, H, W) integer channels, 0 background, 255 ignored.
        old_logits: (B, T, H, W) logits of the old network, channel 0 background.
        threshold: least sigmoid that counts as sure; above 1 no label changes.

    Returns:
        (B, H, W) new tensor in the type of ``labels``.

    Raises:
        ValueError: shapes that do not fit.

    Source:
        EIR (arXiv 2503.22136), our reading, section 3.5.1.
    """
    if old_logits.ndim != 4 or labels.shape != (old_logits.shape[0], *old_logits.shape[2:]):
        raise ValueError(
            f"labels {tuple(labels.shape)} with old_logits {tuple(old_logits.shape)}; expected (B, H, W) with "
            "(B, T, H, W)"
        )
    # The largest logit has the largest sigmoid; logits still differ where sigmoids in float32 are all 1.
    score, channel = at_least_float32(old_logits).max(dim=1)
    # Where the background wins, background is written over background.
    sure = (labels == BACKGROUND) & (score.sigmoid() >= threshold)
    return torch.where(sure, channel.to(labels.dtype), labels)


@torch.no_grad()
def one_hot(labels: Tensor, channels: int) -> Tensor:
    """One row of targets a pixel: 1 at its channel; all zero where the pixel is ignored (255).

    Args:
        labels: (B, H, W) integer channels 0..channels-1, or 255.
        channels: S, background included.

    Returns:
        (B, S, H, W) float32.

    Raises:
        ValueError: labels that are not (B, H, W).
        RuntimeError: a label that is neither below ``channels`` nor 255.

    Source:
        EIR (arXiv 2503.22136), our reading, section 3.5.2.
    """
    if labels.ndim != 3:
        raise ValueError(f"labels {tuple(labels.shape)}; expected (B, H, W)")
    counted = labels != IGNORE
    index = labels.long().masked_fill(~counted, 0)[:, None]
    batch, height, width = labels.shape
    target = torch.zeros(batch, channels, height, width, device=labels.device)
    return target.scatter_(1, index, counted[:, None].to(target.dtype))
