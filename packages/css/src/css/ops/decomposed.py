"""A logit split into what speaks for a class and what speaks against it, and binary losses by class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, conv2d

from css.ops.precision import at_least_float32

__all__ = ["class_targets", "classwise_bce", "decompose", "distil_binary"]


def decompose(feature: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of a linear logit: products with positive and with negative weights, without bias.

    Args:
        feature: (batch, D, h, w).
        weight: (C, D) of the classes' 1x1 convolution.

    Returns:
        (batch, C, h, w) positive reasoning, (batch, C, h, w) negative reasoning; their sum is the logit less its bias.

    Source: Baek et al. 2022 (DKD), arXiv 2210.05941, decomposition of a logit.
    """
    kernel = weight[:, :, None, None]
    return conv2d(feature, kernel.clamp(min=0)), conv2d(feature, kernel.clamp(max=0))


def class_targets(labels: Tensor, first: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One-hot labels of the channels ``first``, ``first`` + 1, ...; every other label is a row of zeros.

    Args:
        labels: (batch, H, W).
        first: first channel.
        channels: number of channels.
        dtype: of the result.

    Returns:
        (batch, channels, H, W).
    """
    wanted = torch.arange(first, first + channels, device=labels.device)
    return (labels.unsqueeze(1) == wanted[:, None, None]).to(dtype)


def classwise_bce(logits: Tensor, target: Tensor, pos_weight: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, a mean over batch and pixels by class, then the sum over classes; float32 at least.

    Args:
        logits: (batch, C, H, W).
        target: (batch, C, H, W) in 0..1.
        pos_weight: weight of positives.
        valid: (batch, H, W) bool, pixels that count; None: all.

    Returns:
        Scalar; 0 where no pixel counts.
    """
    logits = at_least_float32(logits)
    weight = None if pos_weight == 1 else logits.new_tensor(pos_weight)
    mask = None if valid is None else valid.unsqueeze(1).to(logits.dtype)
    total = binary_cross_entropy_with_logits(
        logits, target.to(logits.dtype), weight=mask, pos_weight=weight, reduction="sum"
    )
    pixels = logits[:, 0].numel() if valid is None else valid.sum().clamp(min=1)
    return total / pixels


def distil_binary(new: Tensor, old: Tensor) -> Tensor:
    """Binary cross-entropy against the sigmoid of the old network's values; see ``classwise_bce``.

    Args:
        new: (batch, C, H, W), logits or their parts.
        old: the same shape, without gradient.

    Returns:
        Scalar; smallest, but not 0, where both agree.
    """
    return classwise_bce(new, at_least_float32(old).sigmoid())
