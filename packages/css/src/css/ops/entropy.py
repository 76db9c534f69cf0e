"""Pseudo-labels by entropy: the old network's label counts where it is surer than it usually is about that class."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from css.ops.precision import at_least_float32
from css.task import IGNORE

__all__ = ["entropy_histogram", "entropy_pseudo_label", "median_thresholds", "normalised_entropy"]


@torch.no_grad()
def normalised_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of the softmax over its largest value, and the winning channel.

    Args:
        logits: (batch, T, H, W) with T >= 2.

    Returns:
        (batch, H, W) entropy / log T in 0..1, at least float32; (batch, H, W) int64 channels.
    """
    # picture by picture: two more tensors of all logits would be the peak of a step with 150 classes
    entropies = [torch.special.entr(at_least_float32(picture).softmax(0)).sum(0) for picture in logits]
    return torch.stack(entropies) / math.log(logits.shape[1]), logits.argmax(1)


def entropy_histogram(entropy: Tensor, classes: Tensor, mask: Tensor, channels: int, bins: int = 100) -> Tensor:
    """How often each channel was predicted with which entropy.

    Args:
        entropy: (batch, H, W) in 0..1.
        classes: (batch, H, W) predicted channels.
        mask: (batch, H, W) bool, pixels that count.
        channels: T.
        bins: equal bins of 0..1; 1 falls into the last one.

    Returns:
        (T, bins) int64; histograms of several batches add up.
    """
    place = (entropy * bins).long().clamp(max=bins - 1)
    return torch.bincount((classes * bins + place)[mask], minlength=channels * bins).reshape(channels, bins)


def median_thresholds(histogram: Tensor, floor: float = 0.001) -> Tensor:
    """Median entropy of each channel, between the borders of its bin by its rank in it.

    Args:
        histogram: (T, bins) counts.
        floor: least threshold, also that of a channel that was never predicted.

    Returns:
        (T,) float64 on the CPU, where a cumulative sum is the same every time.
    """
    counts = histogram.cpu().double()
    cumulative = counts.cumsum(1)
    half = cumulative[:, -1:] / 2
    index = (cumulative < half).sum(1, keepdim=True).clamp(max=histogram.shape[1] - 1)
    inside = counts.gather(1, index)
    before = cumulative.gather(1, index) - inside
    median = (index + (half - before) / inside.clamp(min=1)) / histogram.shape[1]
    return median.squeeze(1).clamp(min=floor)


def entropy_pseudo_label(labels: Tensor, old_logits: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Replace all that is no class of the step by what the old network is sure of, and ignore the rest.

    Args:
        labels: (batch, H, W), channels or 255.
        old_logits: (batch, T, H, W); pixels with a label below T are the old network's to label.
        thresholds: (T,) entropies below which a predicted channel counts.

    Returns:
        (batch, H, W) labels; (batch,) share of kept among replaced pixels, 1 where there was nothing to replace.

    Source: Douillard et al. 2021 (PLOP), arXiv 2011.11390, pseudo-labels by entropy.
    """
    entropy, classes = normalised_entropy(old_logits)
    open_ = labels < old_logits.shape[1]
    sure = entropy < thresholds.to(entropy.device, entropy.dtype)[classes]
    completed = torch.where(open_, classes.masked_fill(~sure, IGNORE), labels)
    total = open_.sum((1, 2))
    kept = (open_ & sure).sum((1, 2))
    return completed, torch.where(total > 0, kept / total.clamp(min=1), 1.0)
