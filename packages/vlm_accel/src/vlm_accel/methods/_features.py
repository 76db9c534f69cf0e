"""What the methods after the encoder share: counts, the score, and the form of their answer.

A row is a patch, or on encoders with cells (Qwen, InternVL, SmolVLM) a merged and projected cell whose attention is the
mean of its patches' and whose keys are theirs side by side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from polymodal.errors import UserError

from vlm_accel.methods.base import Reduced
from vlm_accel.ops._select import gather_rows, owners, wide

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.methods.base import Features

__all__ = ["attention", "check_ratio", "gathered", "images", "one_hot", "share"]


def check_ratio(name: str, ratio: float | None) -> None:
    """UserError unless ``ratio`` is None or a share kept in (0, 1]."""
    if ratio is not None and not 0 < ratio <= 1:
        raise UserError(f"{name}: ratio={ratio}; expected a share kept in (0, 1], 0.2 keeps 20 %")


def share(tokens: int, ratio: float) -> int:
    """Tokens kept of ``tokens``, within [1, tokens]; the rounding of steps (iLLaVA 3.1)."""
    return min(tokens, max(1, tokens - round(tokens * (1 - ratio))))


def attention(features: Features, block: int) -> Tensor:
    """(I, N) float32 head mean of the CLS row's attention in ``block`` (without a CLS row: attention received)."""
    return wide(features.cls_attention[block]).mean(1)


def gathered(features: Features, kept: Tensor) -> list[Reduced]:
    """Answer of a method that only drops.

    Args:
        features: as given to ``select``.
        kept: (I, M) int64 rows that stay, ascending.

    Returns:
        one ``Reduced`` an image. M = N gives the same features, no copy.
    """
    x = features.x
    whole = kept.shape[1] == x.shape[1]
    left = x if whole else gather_rows(x, kept)
    if not features.trace:
        return images(left, kept)
    return images(left, kept, owners(kept, x.shape[1]), one_hot(kept, x.shape[1]))


def images(x: Tensor, kept: Tensor, assign: Tensor | None = None, weight: Tensor | None = None) -> list[Reduced]:
    """(I, M, ...) tensors as one ``Reduced`` an image."""
    return [
        Reduced(
            x=x[i : i + 1],
            kept=kept[i : i + 1],
            assign=None if assign is None else assign[i : i + 1],
            weight=None if weight is None else weight[i : i + 1],
        )
        for i in range(len(x))
    ]


def one_hot(kept: Tensor, tokens: int) -> Tensor:
    """(I, M, N) float32: each output row is its own input row."""
    return torch.nn.functional.one_hot(kept, tokens).float()
