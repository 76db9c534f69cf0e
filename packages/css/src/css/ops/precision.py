"""The precision in which losses and scores are worked out, whatever type the network's logits have."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["at_least_float32"]


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 where it is narrower (float16, bfloat16); float32 and float64 stay as they are.

    Args:
        x: any shape.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
