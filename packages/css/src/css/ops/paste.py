"""Mixing stored instances into pictures: where they go (cells), one paste as it is defined, and many at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from css.task import IGNORE

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
    share = torch.as_tensor(lam, dtype=image.dtype, device=image.device)
    pixels = image[:, i : i + down, j : j + across]
    pixels.copy_(torch.where(where, share * small.to(image.dtype) + (1 - share) * pixels, pixels))
    share = torch.as_tensor(lam, dtype=soft_target.dtype, device=soft_target.device)
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
    """Paste n instances into pictures, in place: ``paste_instance`` for many at once.

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
        pictures: (n,) int64 places in the batch. No two pastes of one call may touch the same pixel: one for each
            picture, or different cells of it, since an instance never leaves its cell.
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
    runs, valid = bank.spans(entries, classes)
    if valid.shape[1] == 0:  # none of the entries shows its class
        return images, soft_targets
    device = images.device
    entries, classes, pictures, origins, lams, boxes, flips = (
        tensor.to(device) for tensor in (entries, classes, pictures, origins, lams, boxes, flips)
    )
    crops = _Crops.of(boxes, bank.corners[entries], bank.sizes[entries], height, width)
    first, last = _extent(runs, valid, crops.nearest())
    length = last - first + 1
    # A real division: "number / tensor" multiplies by the reciprocal, and 7 * (1 / 35) of 20 columns would be 3, not 4.
    side = torch.tensor(cell, dtype=torch.float64, device=device)
    scale = (side / (length + 1)).amin(0)
    scale = scale if enlarge else scale.clamp(max=1.0)
    scale = torch.where((length > 1).all(0), scale, 0.0)  # nothing to paste: no rows, no columns
    first[1] = torch.where(flips, width - 1 - last[1], first[1])
    places, used = _shrunk(cell, length, scale, first)
    places[1] = torch.where(flips[:, None], width - 1 - places[1], places[1])
    where = _under_mask(bank, entries, classes, crops, places, used)
    values = _bilinear(bank, entries, crops, places, where).to(images.dtype)
    taken, limits = used.sum(-1), torch.tensor([[height], [width]], device=device)
    corner = torch.where(origins.t() + taken <= limits, origins.t(), limits - 1 - taken)
    _mix(images, soft_targets, pictures, corner, where, values, classes, lams)
    return images, soft_targets


class _Crops(NamedTuple):
    """Rows (first) and columns (second) of n resized crops: from places in the crop to pixels of the stored box."""

    start: Tensor
    """(2, n) first row and column of the crop, in pixels of the stored box"""
    size: Tensor
    """(2, n) height and width of the crop, source pixels"""
    stored: Tensor
    """(2, n) height and width of the stored box, pixels"""
    out: tuple[int, int]
    """height and width after resizing"""
    step: Tensor
    """(2, n, 1) source pixels a pixel of the resized crop"""

    @classmethod
    def of(cls, boxes: Tensor, corners: Tensor, sizes: Tensor, height: int, width: int) -> _Crops:
        size, start = boxes[:, 2:].t().contiguous(), (boxes[:, :2] - corners).t().contiguous()
        out = torch.tensor([[height], [width]], dtype=torch.float32, device=boxes.device)
        return cls(start, size, sizes.t().contiguous(), (height, width), (size / out)[..., None])

    def nearest(self, places: Tensor | None = None) -> Tensor:
        """(2, n, k) pixels of the stored box at (2, n, k) places, by the nearest rule; they may lie outside of it.

        Without places, those of every row and column, ascending; the shorter axis is filled up with high numbers.
        """
        if places is not None:
            return _nearest(places, self.step, self.size) + self.start[..., None]
        longest = max(self.out)
        found = self.nearest(torch.arange(longest, device=self.size.device))
        for axis, out in enumerate(self.out):
            found[axis, :, out:] = torch.iinfo(torch.int64).max
        return found

    def neighbours(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(2, n, k) pixels before and after each place, clamped to crop and box, and the weight of the second."""
        exact = ((places + 0.5) * self.step - 0.5).clamp_(min=0)
        before = exact.long()
        after = torch.minimum(before + 1, self.size[..., None] - 1)
        weight = exact - before
        pair = torch.stack([before, after]).add_(self.start[..., None]).clamp_(min=0)
        before, after = torch.minimum(pair, self.stored[..., None] - 1)
        return before, after, weight


def _nearest(places: Tensor, step: Tensor, size: Tensor) -> Tensor:
    """Source pixels of (..., k) places at float32 steps, clamped to sizes (...): the rule of ``F.interpolate``."""
    return torch.minimum((places * step).long(), size[..., None] - 1)


def _extent(runs: Tensor, valid: Tensor, ascending: Tensor) -> tuple[Tensor, Tensor]:
    """Bounding box of masks after crop and resizing.

    Args:
        runs: (2, 2, n, r) of each horizontal run of the mask: row and first column, then row and column after it.
        valid: (n, r) bool, which runs there are.
        ascending: (2, n, k) stored row of each row of the crop, stored column of each column.

    Returns:
        (2, n) first row and column, (2, n) last ones; the last before the first where nothing is left.
    """
    first = torch.searchsorted(ascending, runs[0])
    last = torch.searchsorted(ascending, runs[1]) - 1
    hit = valid & (first <= last).all(0)
    return torch.where(hit, first, ascending.shape[-1]).amin(-1), torch.where(hit, last, -1).amax(-1)


def _shrunk(cell: int, length: Tensor, scale: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """(2, n, cell) places in the crop of the rows and columns of the resized boxes, and which of them are in use."""
    out = (length * scale).long()
    # F.interpolate copies an axis that keeps its length and repeats each pixel of one that doubles, whatever the scale
    step = torch.where(out == length, 1.0, torch.where(out == 2 * length, 0.5, (1.0 / scale).float()))
    grid = torch.arange(cell, device=length.device)
    used = grid < out[..., None]
    return torch.where(used, _nearest(grid, step[..., None], length) + start[..., None], 0), used


def _under_mask(
    bank: InstanceBank, entries: Tensor, classes: Tensor, crops: _Crops, places: Tensor, used: Tensor
) -> tuple[Tensor, ...]:
    """(p,) paste, row and column in the resized box of every pixel under the mask of its class."""
    y, x = torch.where(used, crops.nearest(places), 0)  # the extent of a mask lies within its stored box
    base = y * crops.stored[1, :, None] + bank.start[entries][:, None]
    flat = base[:, :, None] + x[:, None, :]
    wanted = torch.where(used[0], classes[:, None], IGNORE).to(torch.uint8)  # which no label of the bank is
    hit = bank.labels.index_select(0, flat.flatten()).view_as(flat) == wanted[:, :, None]
    hit &= used[1, :, None, :]
    return hit.nonzero(as_tuple=True)


def _bilinear(bank: InstanceBank, entries: Tensor, crops: _Crops, places: Tensor, where: tuple[Tensor, ...]) -> Tensor:
    """(3, p) normalised colours at (p,) pixels of the resized boxes."""
    paste, row, column = where
    before, after, weight = crops.neighbours(places)
    start, stride = bank.start[entries][:, None], crops.stored[1, :, None]
    begin = paste * places.shape[-1]
    at_row, at_column = begin + row, begin + column
    above, below = ((line[0] * stride + start).flatten().index_select(0, at_row) for line in (before, after))
    left, right = (line[1].flatten().index_select(0, at_column) for line in (before, after))
    fall, shift = (w.flatten().index_select(0, at) for w, at in zip(weight, (at_row, at_column), strict=True))

    def read(place: Tensor) -> Tensor:
        """(3, p) colours at (p,) places: one read for the bytes of a pixel."""
        found = bank.pixels.index_select(0, place).view(torch.uint8).view(-1, 4).t()[:3]
        return found.to(torch.float32, memory_format=torch.contiguous_format)

    upper = torch.lerp(read(above + left), read(above + right), shift)
    lower = torch.lerp(read(below + left), read(below + right), shift)
    return torch.lerp(upper, lower, fall).sub_(bank.shift).mul_(bank.factor)


def _mix(
    images: Tensor,
    soft_targets: Tensor,
    pictures: Tensor,
    corner: Tensor,
    where: tuple[Tensor, ...],
    values: Tensor,
    classes: Tensor,
    lams: Tensor,
) -> None:
    """Mix (3, p) colours and the classes of n pastes in place; ``corner``: (2, n) first row and column of each."""
    paste, row, column = where
    batch, channels, height, width = soft_targets.shape
    plane, offset, shift = height * width, row * width + column, corner[0] * width + corner[1]

    def spots(planes: Tensor) -> Tensor:
        """(p,) places in a flat tensor, of which each paste has its own plane."""
        return (planes * plane + shift).index_select(0, paste).add_(offset)

    share = lams.to(images.dtype).index_select(0, paste)
    flat = images.contiguous().view(-1)
    at = (torch.arange(0, 3 * plane, plane, device=paste.device)[:, None] + spots(3 * pictures)).flatten()
    flat.index_copy_(0, at, (share * values).add_((1 - share) * flat.index_select(0, at).view(3, -1)).flatten())
    if not images.is_contiguous():
        images.copy_(flat.view(images.shape))
    # One pass over all of the target is faster than reading and writing the rows of the pixels, which lie apart.
    share = share.to(soft_targets.dtype) if images.dtype == soft_targets.dtype else lams.to(soft_targets.dtype)[paste]
    keep = soft_targets.new_ones(batch * plane).index_copy_(0, spots(pictures), 1 - share)
    soft_targets.mul_(keep.view(batch, 1, height, width))
    flat = soft_targets.contiguous().view(-1)
    flat.index_add_(0, spots(channels * pictures + classes), share)
    if not soft_targets.is_contiguous():
        soft_targets.copy_(flat.view(soft_targets.shape))
