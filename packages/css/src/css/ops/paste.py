"""Mixing stored instances into pictures: where they go (cells), one paste as it is defined, and many at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from css.memory.bank import InstanceBank

__all__ = ["cell_side", "paste_batch", "paste_instance", "rank_cells", "rank_cells_batch"]


def cell_side(height: int) -> int:
    """Side of a cell in pixels for pictures of ``height`` pixels: 250 at 512, in proportion else (64: 31, 256: 125)."""
    return height * 250 // 512


def rank_cells_batch(foreground: Tensor, cell: int) -> tuple[Tensor, Tensor]:
    """Square cells of each picture, the one with most background first.

    Args:
        foreground: (batch, H, W) bool, True where something was recognised; ignored pixels are False.
        cell: side of a cell, pixels; cells start at rows and columns 0, cell, 2 cell, ... as long as they fit.

    Returns:
        Origins (batch, cells, 2) int64, (row, column); background pixels in them (batch, cells) int64. Ties stay in
        row-major order. No cell where ``cell`` is larger than the picture.

    Raises:
        ValueError: ``cell`` below 1.

    Source: Yin et al. 2025, position selection.
    """
    if cell < 1:
        raise ValueError(f"cell={cell}; expected a side of at least 1 pixel")
    batch, height, width = foreground.shape
    down, across = height // cell, width // cell
    used = foreground[:, : down * cell, : across * cell].reshape(batch, down, cell, across, cell)
    background = cell * cell - used.sum((2, 4), dtype=torch.int64).flatten(1)
    counts, order = background.sort(dim=1, descending=True, stable=True)
    origins = torch.stack([order // max(across, 1), order % max(across, 1)], dim=-1) * cell
    return origins, counts


def rank_cells(foreground_mask: Tensor, cell: int) -> list[tuple[tuple[int, int], int]]:
    """Cells of one picture, the one with most background first: ``rank_cells_batch`` as plain numbers.

    Args:
        foreground_mask: (H, W) bool, True where something was recognised.
        cell: side of a cell, pixels.

    Returns:
        ((row, column) of the origin, background pixels) of every cell; ties in row-major order.

    Raises:
        ValueError: ``cell`` below 1.

    Source: Yin et al. 2025, position selection.
    """
    origins, counts = rank_cells_batch(foreground_mask[None], cell)
    return [((row, column), count) for (row, column), count in zip(origins[0].tolist(), counts[0].tolist(), strict=True)]


def paste_instance(
    image: Tensor,
    soft_target: Tensor,
    instance: Tensor,
    mask: Tensor,
    cls: int,
    origin: tuple[int, int],
    cell: int,
    lam: float,
    enlarge: bool = True,
) -> tuple[Tensor, Tensor]:
    """Mix one instance into a cell of a picture and its class into the target.

    The bounding box of the mask is resized (nearest, same aspect) to fit the cell with a pixel to spare, then under
    the resized mask ``image = lam * instance + (1 - lam) * image`` and the target row likewise with the one-hot row of
    ``cls``. A target row of zeros (ignored pixel) becomes ``lam * onehot(cls)``. Everything off the mask stays as it is.
    Masks that are empty, one pixel wide or high, or shrink to nothing are not pasted.

    Args:
        image: (3, H, W) picture.
        soft_target: (S, H, W) target, rows over S sum to 1, or to 0 where ignored.
        instance: (3, h, w) picture with the instance, normalised like ``image``.
        mask: (h, w) bool, where the instance is.
        cls: channel of its class, 0..S-1.
        origin: (row, column) of the cell's first pixel; an instance that would stick out is moved inside.
        cell: side of the cell, pixels, at most H and W.
        lam: share of the instance in the mix, 0..1; 0 changes nothing, 1 replaces.
        enlarge: let small instances grow to fill the cell, as published; False never enlarges (ours).

    Returns:
        New (image, soft_target); the arguments are not changed.

    Raises:
        ValueError: a cell larger than the picture or an origin outside of it.

    Source: Yin et al. 2025, instance replay; resizing and placing as in the authors' code.
    """
    height, width = image.shape[-2:]
    if not 1 <= cell <= min(height, width) or not (0 <= origin[0] < height and 0 <= origin[1] < width):
        raise ValueError(f"cell={cell} at origin={origin}; expected a cell inside the picture of {height} x {width}")
    image, soft_target = image.clone(), soft_target.clone()
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    if len(rows) == 0 or rows[0] == rows[-1] or columns[0] == columns[-1]:
        return image, soft_target
    (y0, y1), (x0, x1) = (int(rows[0]), int(rows[-1])), (int(columns[0]), int(columns[-1]))
    scale = min(cell / (x1 - x0 + 2), cell / (y1 - y0 + 2))
    scale = scale if enlarge else min(scale, 1.0)
    if int((y1 - y0 + 1) * scale) == 0 or int((x1 - x0 + 1) * scale) == 0:
        return image, soft_target
    small = functional.interpolate(instance[None, :, y0 : y1 + 1, x0 : x1 + 1], scale_factor=scale, mode="nearest")[0]
    box = mask[None, None, y0 : y1 + 1, x0 : x1 + 1].float()
    where = functional.interpolate(box, scale_factor=scale, mode="nearest")[0, 0] > 0
    down, across = where.shape
    i = origin[0] if origin[0] + down <= height else height - 1 - down
    j = origin[1] if origin[1] + across <= width else width - 1 - across
    share = torch.tensor(lam, dtype=image.dtype, device=image.device)
    pixels = image[:, i : i + down, j : j + across]
    pixels.copy_(torch.where(where, share * small.to(image.dtype) + (1 - share) * pixels, pixels))
    share = torch.tensor(lam, dtype=soft_target.dtype, device=soft_target.device)
    target = soft_target[:, i : i + down, j : j + across]
    mixed = (1 - share) * target
    mixed[cls] += share
    target.copy_(torch.where(where, mixed, target))
    return image, soft_target
