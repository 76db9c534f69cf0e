"""Every instance of a memory, decoded once, as a few flat tensors that pasting reads from; and the draws among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from css.data.transforms import MEAN, STD

if TYPE_CHECKING:
    from css.memory.store import InstanceMemory

__all__ = ["InstanceBank"]

_TRIES = 10
_TENSORS = (
    "pixels",
    "labels",
    "start",
    "sizes",
    "corners",
    "sources",
    "runs",
    "run_start",
    "run_count",
    "shift",
    "factor",
)


class InstanceBank:
    """Decoded instances. Boxes of different sizes lie one after the other, so that none is padded to the largest.

    Args:
        memory: the memory; its files are read once, here.
        device: where the tensors lie.

    Attributes:
        pixels: (N,) int32: red, green and blue as the first three of four bytes, row by row, entry by entry.
        labels: (N,) uint8: channel of the class at each pixel, 0 where there is none.
        start: (E,) first pixel of each entry in ``pixels``.
        sizes: (E, 2) height and width of the stored box.
        corners: (E, 2) first row and column of the stored box in the source picture.
        sources: (E, 2) height and width of the source picture.
        runs: (2, 2, R) horizontal runs of the masks, in the stored box: row and first column, then the row and the
            column after it.
        run_start: (E, C) first run of a class in an entry.
        run_count: (E, C) number of its runs.
        shift: (3, 1) mean colour, 0..255.
        factor: (3, 1) what turns a difference to it into a normalised value.
        slots: channel -> (k,) entries kept for that class; always on the CPU.
    """

    def __init__(self, memory: InstanceMemory, device: torch.device | str = "cpu") -> None:
        decoded = [entry.crop() for entry in memory.entries]
        counts = [label.size for _, label in decoded]
        blocks = [np.dstack([image, np.zeros_like(label)]).reshape(-1, 4) for image, label in decoded]
        colours = np.concatenate([np.zeros((0, 4), np.uint8), *blocks])
        self.pixels = torch.from_numpy(colours.view(np.int32).ravel())
        self.labels = torch.from_numpy(
            np.concatenate([np.zeros(0, np.uint8), *(label.ravel() for _, label in decoded)])
        )
        self.start = torch.tensor([0, *counts], dtype=torch.int64).cumsum(0)[:-1]
        self.sizes = _pairs([label.shape for _, label in decoded])
        self.corners = _pairs([entry.box[:2] for entry in memory.entries])
        self.sources = _pairs([entry.size for entry in memory.entries])
        self.runs, self.run_start, self.run_count = _index_runs(
            [label for _, label in decoded], max((entry.slot for entry in memory.entries), default=0)
        )
        self.shift = torch.tensor(MEAN)[:, None] * 255
        self.factor = 1 / (torch.tensor(STD)[:, None] * 255)
        self._host_count, self._host_sources = self.run_count, self.sources  # for draws and sizes without waiting
        self.slots: dict[int, Tensor] = {}
        for channel in sorted({entry.slot for entry in memory.entries}):
            numbers = [number for number, entry in enumerate(memory.entries) if entry.slot == channel]
            self.slots[channel] = torch.tensor(numbers)
        self._numbers = {channel: slot.tolist() for channel, slot in self.slots.items()}  # single ones are read faster
        self.to(device)

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def device(self) -> torch.device:
        """Where the instances lie."""
        return self.pixels.device

    def to(self, device: torch.device | str) -> InstanceBank:
        """Move the instances; returns the bank itself."""
        for name in _TENSORS:
            setattr(self, name, getattr(self, name).to(device))
        return self

    def spans(self, entries: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Horizontal runs of one class in each of n entries.

        Args:
            entries: (n,) int64.
            classes: (n,) int64 channels.

        Returns:
            (2, 2, n, r) int64 runs, see ``runs``, and (n, r) bool, which of them there are.
        """
        most = int(self._host_count[entries.cpu(), classes.cpu()].max()) if len(entries) else 0
        entries, classes = entries.to(self.device), classes.to(self.device)
        place = torch.arange(most, device=self.device)
        valid = place < self.run_count[entries, classes][:, None]
        index = torch.where(valid, self.run_start[entries, classes][:, None] + place, 0)
        return self.runs.index_select(2, index.flatten()).view(2, 2, *index.shape), valid

    def draw(self, channels: Sequence[int] | Tensor, generator: torch.Generator) -> Tensor:
        """One entry of each slot named, every entry of a slot with the same probability.

        Args:
            channels: n channels; a slot may be named more than once.
            generator: CPU generator; one number is drawn for each channel.

        Returns:
            (n,) int64 entries, on the CPU.

        Raises:
            ValueError: a slot without entries.
        """
        wanted = torch.as_tensor(channels).tolist()
        draws = torch.rand(len(wanted), generator=generator, dtype=torch.float64).tolist()
        found = []
        for channel, draw in zip(wanted, draws, strict=True):
            slot = self._numbers.get(channel)
            if slot is None:
                raise ValueError(f"channel {channel} has no entries; slots: {', '.join(map(str, self.slots))}")
            found.append(slot[int(draw * len(slot))])
        return torch.tensor(found, dtype=torch.int64)

    def augment(
        self,
        entries: Tensor,
        generator: torch.Generator,
        scale: Sequence[float] = (0.5, 2.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ) -> tuple[Tensor, Tensor]:
        """Random resized crops of the source pictures of n entries, and whether they are mirrored.

        The rule is torchvision's: an area and an aspect are drawn ten times, the first box that fits is taken, at a
        random place; where none fits, the largest central box with an allowed aspect. All numbers are drawn at once,
        so that how many are used up does not depend on the entries.

        Args:
            entries: (n,) int64.
            generator: CPU generator.
            scale: smallest and largest share of the picture's area.
            ratio: smallest and largest width by height.
            flip: probability of the mirror image, 0..1.

        Returns:
            (n, 4) int64 top, left, height, width in source pixels; (n,) bool. Both on the CPU.
        """
        draws = torch.rand(len(entries), 2 * _TRIES + 3, generator=generator, dtype=torch.float64)
        height, width = self._host_sources[entries.cpu()].double().unbind(1)
        lower, upper = math.log(ratio[0]), math.log(ratio[1])
        area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * draws[:, :_TRIES])
        aspect = torch.exp(lower + (upper - lower) * draws[:, _TRIES : 2 * _TRIES])
        wide, high = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (wide > 0) & (wide <= width[:, None]) & (high > 0) & (high <= height[:, None])
        first = fits.to(torch.uint8).argmax(1, keepdim=True)
        central_high = torch.where(width / height < ratio[0], (width / ratio[0]).round(), height)
        central_wide = torch.where(width / height > ratio[1], (height * ratio[1]).round(), width)
        drawn = fits.any(1)
        high = torch.where(drawn, high.gather(1, first)[:, 0], central_high)
        wide = torch.where(drawn, wide.gather(1, first)[:, 0], central_wide)
        top = torch.where(drawn, (draws[:, -3] * (height - high + 1)).floor(), ((height - high) / 2).floor())
        left = torch.where(drawn, (draws[:, -2] * (width - wide + 1)).floor(), ((width - wide) / 2).floor())
        return torch.stack([top, left, high, wide], dim=1).long(), draws[:, -1] < flip


def _pairs(values: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([list(pair) for pair in values], dtype=torch.int64).reshape(-1, 2)


def _index_runs(labels: Sequence[np.ndarray], top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of all classes of all entries (2, 2, R), and first run and number of runs by entry and class (E, C).

    Classes go up to ``top`` or the largest label: an entry whose label is empty has no run of its slot, and is skipped.
    """
    top = max([top, *(int(label.max(initial=0)) for label in labels)])
    start, count = np.zeros((2, len(labels), top + 1), np.int64)
    runs: list[np.ndarray] = [np.zeros((2, 2, 0), np.int64)]
    total = 0
    for entry, label in enumerate(labels):
        for channel in np.unique(label[label > 0]).tolist():
            found = mask_runs(label == channel)
            runs.append(found)
            start[entry, channel], count[entry, channel] = total, found.shape[2]
            total += found.shape[2]
    return torch.from_numpy(np.concatenate(runs, axis=2)), torch.from_numpy(start), torch.from_numpy(count)


def mask_runs(mask: np.ndarray) -> np.ndarray:
    """Horizontal runs of a mask (H, W) bool, in row-major order.

    Returns:
        (2, 2, R) int64: row and first column, then the row and the column after it.
    """
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, first = (edges == 1).nonzero()
    last = (edges == -1).nonzero()[1]
    return np.array([[rows, first], [rows + 1, last]], np.int64)
