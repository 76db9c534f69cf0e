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
    return [
        ((row, column), count) for (row, column), count in zip(origins[0].tolist(), counts[0].tolist(), strict=True)
    ]


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
    ``cls``. A target row of zeros (ignored pixel) becomes ``lam * onehot(cls)``. What is off the mask stays as it is.
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


@torch.no_grad()
def paste_batch(
    images: Tensor,
    soft_targets: Tensor,
    bank: InstanceBank,
    entries: Tensor,
    classes: Tensor,
    pictures: Tensor,
    origins: Tensor,
    cell: int,
    lams: Tensor,
    boxes: Tensor,
    flips: Tensor,
    enlarge: bool = True,
) -> tuple[Tensor, Tensor]:
    """Paste one instance into each of n pictures, in place: a round of ``paste_instance``.

    The result is that of: take the stored picture of an entry at its source size, crop ``boxes`` and resize it to
    H x W (bilinear; the mask nearest), mirror it where ``flips`` says so, and call ``paste_instance`` with the mask of
    its class. None of these pictures is made: the index maps are composed and only pixels that are pasted are read.
    The bilinear rule looks at four neighbours, without the wider filter (antialias) of a reduction: a gather needs a
    fixed number of neighbours, and crops are seldom larger than what they are resized to.

    Small tensors may lie on the CPU, where they are drawn; then the only wait for an accelerator is the count of
    pasted pixels.

    Args:
        images: (B, 3, H, W) normalised pictures, changed in place.
        soft_targets: (B, S, H, W) targets, changed in place.
        bank: decoded instances, on the device of ``images``.
        entries: (n,) int64 entries of the bank.
        classes: (n,) int64 channel of the instance, one of the entry's classes.
        pictures: (n,) int64 places in the batch, each at most once.
        origins: (n, 2) int64 first row and column of the cell.
        cell: side of the cell, pixels, at most H and W.
        lams: (n,) share of the instance in the mix, 0..1.
        boxes: (n, 4) int64 top, left, height, width of the crop in source pixels.
        flips: (n,) bool.
        enlarge: see ``paste_instance``.

    Returns:
        ``images`` and ``soft_targets``.

    Raises:
        ValueError: a cell larger than the picture.

    Source: Yin et al. 2025, instance replay.
    """
    height, width = images.shape[-2:]
    if not 1 <= cell <= min(height, width):
        raise ValueError(f"cell={cell}; expected a side of 1 to {min(height, width)}, the shorter one of the pictures")
    if len(entries) == 0:
        return images, soft_targets
    spans = bank.spans(entries, classes)
    device = images.device
    entries, classes, pictures, origins, lams, boxes, flips = (
        tensor.to(device) for tensor in (entries, classes, pictures, origins, lams, boxes, flips)
    )
    corners, sizes = bank.corners[entries], bank.sizes[entries]
    crops = _Axis.of(boxes[:, 0], boxes[:, 2], corners[:, 0], sizes[:, 0], height)
    across = _Axis.of(boxes[:, 1], boxes[:, 3], corners[:, 1], sizes[:, 1], width)
    top, bottom, left, right = _extent(spans, crops.nearest(), across.nearest())
    tall, wide = bottom - top + 1, right - left + 1
    scale = torch.minimum(cell / (wide + 1).double(), cell / (tall + 1).double())
    scale = scale if enlarge else scale.clamp(max=1.0)
    scale = torch.where((tall > 1) & (wide > 1), scale, 0.0)  # nothing to paste: no rows, no columns
    left = torch.where(flips, width - 1 - right, left)
    grid = torch.arange(cell, device=device)
    rows, row_used = _shrunk(grid, tall, scale, top)
    columns, column_used = _shrunk(grid, wide, scale, left)
    columns = torch.where(flips[:, None], width - 1 - columns, columns)
    paste, row, column = _under_mask(bank, entries, classes, crops, across, rows, columns, row_used, column_used)
    values = _bilinear(bank, entries, crops, across, rows, columns, (paste, row, column)).to(images.dtype)
    y = _placed(origins[:, 0], row_used, height)[paste] + row
    x = _placed(origins[:, 1], column_used, width)[paste] + column
    _mix(images, soft_targets, pictures[paste], y, x, values, classes[paste], lams[paste])
    return images, soft_targets


class _Axis(NamedTuple):
    """One axis of n resized crops: from a place in the crop (0..out-1) to places in the stored box."""

    start: Tensor
    """(n,) start of the crop, in pixels of the stored box"""
    size: Tensor
    """(n,) length of the crop, source pixels"""
    stored: Tensor
    """(n,) length of the stored box, pixels"""
    out: int
    """length after resizing"""

    @classmethod
    def of(cls, start: Tensor, size: Tensor, corner: Tensor, stored: Tensor, out: int) -> _Axis:
        return cls(start - corner, size, stored, out)

    def nearest(self, places: Tensor | None = None) -> Tensor:
        """(n, k) pixel of the stored box at (n, k) places, by the nearest rule; may lie outside of the box."""
        if places is None:
            places = torch.arange(self.out, device=self.size.device).expand(len(self.size), -1)
        return _nearest(places, self.size.float() / self.out, self.size) + self.start[:, None]

    def neighbours(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, k) pixels before and after each place, clamped to crop and box, and the weight of the second."""
        step = (self.size.float() / self.out)[:, None]
        exact = ((places.float() + 0.5) * step - 0.5).clamp(min=0)
        first = exact.long()
        second = torch.minimum(first + 1, self.size[:, None] - 1)
        limit = self.stored[:, None] - 1
        inside = [torch.minimum((p + self.start[:, None]).clamp(min=0), limit) for p in (first, second)]
        return inside[0], inside[1], exact - first


def _nearest(places: Tensor, step: Tensor, size: Tensor) -> Tensor:
    """Source pixels of (n, k) places at (n,) float32 steps, clamped to (n,) sizes: the rule of ``F.interpolate``."""
    return torch.minimum((places.float() * step[:, None]).floor().long(), size[:, None] - 1)


def _extent(spans: tuple[Tensor, Tensor], rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bounding box, inclusive, of masks after crop and resizing.

    Args:
        spans: (n, r, 3) row, first column and column after the last of each horizontal run of the mask, in stored
            pixels, and (n, r) bool, which of them there are.
        rows: (n, H) stored row of each row, ascending.
        columns: (n, W) stored column of each column, ascending.

    Returns:
        (n,) top, bottom, left, right; bottom below top where nothing is left.
    """
    runs, valid = spans
    row, start, stop = (part.contiguous() for part in runs.unbind(-1))
    first_row, last_row = torch.searchsorted(rows, row), torch.searchsorted(rows, row, right=True) - 1
    first, last = torch.searchsorted(columns, start), torch.searchsorted(columns, stop) - 1
    hit = valid & (first_row <= last_row) & (first <= last)
    high = rows.shape[1] + columns.shape[1]
    top, left = (torch.where(hit, value, high).amin(1) for value in (first_row, first))
    bottom, right = (torch.where(hit, value, -1).amax(1) for value in (last_row, last))
    return top, bottom, left, right


def _shrunk(grid: Tensor, length: Tensor, scale: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """(n, cell) places in the crop of the rows (or columns) of resized boxes, and which of them are in use."""
    out = (length * scale).long()
    # F.interpolate copies an axis that keeps its length and repeats each pixel of one that doubles, whatever the scale
    step = torch.where(out == length, 1.0, torch.where(out == 2 * length, 0.5, (1.0 / scale).float()))
    used = grid < out[:, None]
    places = _nearest(grid.expand(len(length), -1), step, length) + start[:, None]
    return torch.where(used, places, 0), used


def _placed(origin: Tensor, used: Tensor, limit: int) -> Tensor:
    """(n,) first row (or column) in the picture; what would stick out is moved inside."""
    length = used.sum(1)
    return torch.where(origin + length <= limit, origin, limit - 1 - length)


def _under_mask(
    bank: InstanceBank,
    entries: Tensor,
    classes: Tensor,
    down: _Axis,
    across: _Axis,
    rows: Tensor,
    columns: Tensor,
    row_used: Tensor,
    column_used: Tensor,
) -> tuple[Tensor, ...]:
    """(p,) paste, row and column in the resized box of every pixel under the mask of its class."""
    y, x = down.nearest(rows), across.nearest(columns)
    row_used = row_used & (y >= 0) & (y < down.stored[:, None])
    column_used = column_used & (x >= 0) & (x < across.stored[:, None])
    base = torch.where(row_used, bank.start[entries][:, None] + y * across.stored[:, None], 0)
    flat = base[:, :, None] + torch.where(column_used, x, 0)[:, None, :]
    hit = bank.pixels[:, 3][flat] == classes.to(torch.uint8)[:, None, None]
    hit &= row_used[:, :, None]
    hit &= column_used[:, None, :]
    return hit.nonzero(as_tuple=True)


def _bilinear(
    bank: InstanceBank,
    entries: Tensor,
    down: _Axis,
    across: _Axis,
    rows: Tensor,
    columns: Tensor,
    where: tuple[Tensor, ...],
) -> Tensor:
    """(p, 3) normalised colours at (p,) pixels of the resized boxes."""
    paste, row, column = where
    above, below, fall = down.neighbours(rows)
    before, after, shift = across.neighbours(columns)
    side = rows.shape[1]
    start, stride = bank.start[entries][:, None], across.stored[:, None]
    at_row, at_column = paste * side + row, paste * side + column
    above, below = ((start + line * stride).flatten()[at_row] for line in (above, below))
    before, after = before.flatten()[at_column], after.flatten()[at_column]
    fall, shift = fall.flatten()[at_row, None], shift.flatten()[at_column, None]
    packed = bank.pixels.view(torch.int32)[:, 0]  # one read for the four bytes of a pixel

    def read(place: Tensor) -> Tensor:
        return packed[place][:, None].view(torch.uint8)[:, :3].float()

    upper = torch.lerp(read(above + before), read(above + after), shift)
    lower = torch.lerp(read(below + before), read(below + after), shift)
    return (torch.lerp(upper, lower, fall) - bank.shift) * bank.factor


def _mix(
    images: Tensor,
    soft_targets: Tensor,
    picture: Tensor,
    y: Tensor,
    x: Tensor,
    values: Tensor,
    classes: Tensor,
    lams: Tensor,
) -> None:
    """Mix (p, 3) colours and (p,) classes into (p,) different pixels, in place."""
    share = lams.to(images.dtype)[:, None]
    images[picture, :, y, x] = share * values + (1 - share) * images[picture, :, y, x]
    share = lams.to(soft_targets.dtype)[:, None]
    rows = (1 - share) * soft_targets[picture, :, y, x]
    rows.scatter_add_(1, classes[:, None], share)
    soft_targets[picture, :, y, x] = rows
