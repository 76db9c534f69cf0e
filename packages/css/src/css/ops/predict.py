"""Labels of logits that stand alone: the most likely class if it is more likely than not, else background."""

from __future__ import annotations

import torch
from torch import Tensor

from css.task import BACKGROUND

__all__ = ["predict"]


@torch.no_grad()
def predict(logits: Tensor) -> Tensor:
    """The class with the highest sigmoid where that is above 0.5, else background; channel 0 is not looked at.

    Args:
        logits: (B, S, H, W) or (S, H, W), channel 0 background.

    Returns:
        (B, H, W) or (H, W) int64 channels.

    Raises:
        ValueError: logits of another shape.

    Source:
        EIR (arXiv 2503.22136), our reading, section 3.2.
    """
    if logits.ndim not in (3, 4):
        raise ValueError(f"logits {tuple(logits.shape)}; expected (B, S, H, W) or (S, H, W)")
    classes = logits.narrow(-3, 1, logits.shape[-3] - 1)
    if classes.shape[-3] == 0:
        return torch.full(logits[..., 0, :, :].shape, BACKGROUND, device=logits.device)
    score, place = classes.max(dim=-3)
    # sigmoid(z) > 0.5 is z > 0.
    return torch.where(score > 0, place + 1, BACKGROUND)
