"""Local POD: feature maps compared by the means of rows and columns of tiles at several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from css.ops.precision import at_least_float32

__all__ = ["fold_new", "local_pod", "pod_distance"]


def local_pod(x: Tensor, scales: Sequence[int] = (1, 2, 4)) -> Tensor:
    """Row means and column means of every tile, one after the other.

    At scale s a map is cut into s x s tiles of floor(h/s) x floor(w/s); what is left over at the right and at the
    bottom is not looked at. A scale with more tiles than rows or columns is left out.

    Args:
        x: (batch, C, h, w).
        scales: tiles a side.

    Returns:
        (batch, number of means).

    Source: Douillard et al. 2021 (PLOP), arXiv 2011.11390, Local POD; means of rows and columns, as in the released
    code.
    """
    batch, channels, height, width = x.shape
    parts = []
    for scale in scales:
        rows, columns = height // scale, width // scale
        if not rows or not columns:
            continue
        cut = x[:, :, : rows * scale, : columns * scale]
        tiles = cut.reshape(batch, channels, scale, rows, scale, columns)
        parts += [tiles.mean(5).flatten(1), tiles.mean(3).flatten(1)]
    return torch.cat(parts, 1)


def pod_distance(new: Tensor, old: Tensor, scales: Sequence[int] = (1, 2, 4)) -> Tensor:
    """Euclidean distance of the embeddings of squared maps, a mean over the batch; float32 at least.

    Args:
        new: (batch, C, h, w).
        old: the same shape.
        scales: see ``local_pod``.

    Returns:
        Scalar; its gradient where both agree is 0.
    """
    # the embedding is linear, so that one of the difference does
    difference = local_pod(at_least_float32(new).square() - at_least_float32(old).square(), scales)
    distance: Tensor = difference.norm(dim=1)
    return distance.mean()


def fold_new(logits: Tensor, channels: int) -> Tensor:
    """Logits in the old network's channels: those of new classes are added to the background's.

    Args:
        logits: (batch, S, h, w).
        channels: T <= S.

    Returns:
        (batch, T, h, w).
    """
    if logits.shape[1] == channels:
        return logits
    background = logits[:, :1] + logits[:, channels:].sum(1, keepdim=True)
    return torch.cat([background, logits[:, 1:channels]], 1)
