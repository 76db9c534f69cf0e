"""The classification loss: one binary decision a channel, with soft targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from css.ops.precision import at_least_float32

__all__ = ["soft_binary_loss"]


def soft_binary_loss(logits: Tensor, soft_target: Tensor) -> Tensor:
    """Binary cross-entropy, summed over the channels, mean over the pixels whose row of targets is not all zero.

    Args:
        logits: (B, S, H, W).
        soft_target: (B, S, H, W) in 0..1; an all-zero row (an ignored pixel) counts nowhere.

    Returns:
        Scalar in float32 or float64; 0, with gradient 0, where no pixel counts.

    Raises:
        ValueError: shapes that differ.

    Source:
        EIR (arXiv 2503.22136), our reading, section 3.7, L_bce.
    """
    if logits.ndim != 4 or logits.shape != soft_target.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and soft_target {tuple(soft_target.shape)}; expected both (B, S, H, W)"
        )
    with torch.autocast(device_type=logits.device.type, enabled=False):
        logits = at_least_float32(logits)
        target = soft_target.to(logits.dtype)
        counted = (target.sum(dim=1, keepdim=True) != 0).to(logits.dtype)
        # The mean as a weight: no second tensor of the size of the logits is kept for the backward pass.
        weight = counted / counted.sum().clamp(min=1)
        return F.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="sum")
