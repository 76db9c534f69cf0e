"""Images packed into one sequence of rows (Qwen): which rows belong to which image while they grow fewer.

A segment is one image or one temporal slice of a video: rows attend within it and are ranked within it. The rows of a
segment are contiguous in the sequence. Cells (2 x 2 patches that a merger joins later) are contiguous within a segment.
Where attention is windowed the encoder sorts the cells of a segment by window; methods still get them in raster order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from vlm_accel.encoders.base import VisionState
from vlm_accel.session import VisionRecord

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.methods.base import TokenMethod
    from vlm_accel.schedule import Step
    from vlm_accel.session import Session

__all__ = ["Group", "PackedCall", "Windows"]


@dataclass(frozen=True)
class Windows:
    """Order of the cells of a whole call under windowed attention.

    Args:
        order: (C,) int64, cell (raster order within its segment) at each place of the sequence.
        bounds: first row of each window, and the end.
    """

    order: Tensor
    bounds: list[int]


@dataclass
class Group:
    """Segments of one size: they are reduced together.

    Args:
        members: numbers of the segments in the sequence.
        state: their cells. rows: (S, n) int64 row of each patch in the sequence now, cells in raster order.
        whole: whether these are all rows, in their order in the sequence.
        bias: (S, n) key bias of each row now, or None.
    """

    members: list[int]
    state: VisionState
    rows: Tensor
    whole: bool
    bias: Tensor | None = None

    def take(self, packed: Tensor) -> Tensor:
        """(R, ...) rows of the sequence -> (S, n, ...), cells in raster order."""
        picked = packed if self.whole else packed[self.rows.flatten()]
        return picked.reshape(*self.rows.shape, *packed.shape[1:])


class PackedCall:
    """One encoder call.

    Args:
        session: the acceleration.
        grids: (slices, height, width) in patches of each image or video.
        group: patches per cell.
        windows: order of the cells where the encoder has windowed attention.
        device: of the rows.
    """

    def __init__(
        self,
        session: Session,
        grids: Sequence[tuple[int, int, int]],
        group: int,
        windows: Windows | None,
        device: torch.device,
    ) -> None:
        self.session = session
        self.group = group
        self.windows = windows
        self.device = device
        self.grids = [(h, w) for t, h, w in grids for _ in range(t)]
        self.full = [h * w for h, w in self.grids]
        self.lengths = list(self.full)
        self.origin: Tensor | None = None
        self.position: tuple[Tensor, ...] | None = None
        self.record = VisionRecord(images=len(self.full))
        self._windows_left: list[int] | None = None
        self._seqlens: dict[bool, tuple[Tensor, int]] = {}
        self.groups = self._grouped()

    @property
    def shortened(self) -> bool:
        """Whether any row has gone."""
        return self.origin is not None

    def _grouped(self) -> list[Group]:
        members: dict[tuple[int, int], list[int]] = {}
        for number, grid in enumerate(self.grids):
            members.setdefault(grid, []).append(number)
        starts = [0, *accumulate(self.full)]
        place = None
        if self.windows is not None:  # where each cell, counted in raster order, stands in the sequence
            order = self.windows.order.to(self.device)
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order), device=self.device)
        groups = []
        for grid, numbers in members.items():
            count = grid[0] * grid[1]
            state = VisionState(self.session, len(numbers), count, grid, group=self.group, device=self.device)
            state.span = _sent(numbers, self.device)
            first = _sent([starts[number] for number in numbers], self.device)
            rows = first[:, None] + torch.arange(count, device=self.device)
            whole = place is None and len(members) == 1
            if place is not None:
                cells = place[rows[:, :: self.group] // self.group]
                rows = (cells[..., None] * self.group + torch.arange(self.group, device=self.device)).flatten(1)
            groups.append(Group(numbers, state, rows, whole))
        return groups

    def lengths_at(self, windowed: bool) -> list[int]:
        """Rows of each run of rows that attend to each other in a block of that kind, as they are now.

        Survivors per segment are known beforehand. Survivors per window depend on the picture: they are read back
        from the device once per step (attention that splits by window reads lengths at every block anyway); windows
        without survivors are left out.
        """
        if not windowed or self.windows is None:
            return list(self.lengths)
        if self.origin is None:
            return _differences(self.windows.bounds)
        if self._windows_left is None:
            edges = _sent(self.windows.bounds, self.device)
            found = torch.searchsorted(self.origin, edges).tolist()
            self._windows_left = [count for count in _differences(found) if count]
        return self._windows_left

    def full_lengths_at(self, windowed: bool) -> list[int]:
        """The same for the encoder as it is."""
        return _differences(self.windows.bounds) if windowed and self.windows is not None else list(self.full)

    def seqlens(self, windowed: bool, device: torch.device) -> tuple[Tensor, int]:
        """``(cu_seqlens int32, max_seqlen)`` of the rows left: of each segment, or of each window that is not empty.

        Args:
            windowed: which.
            device: of the result: attention that splits by length wants it on the CPU, so that
                nothing is read back from the accelerator.
        """
        if windowed not in self._seqlens:
            lengths = self.lengths_at(windowed)
            bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            self._seqlens[windowed] = bounds.to(device, non_blocking=True), max(lengths)
        return self._seqlens[windowed]

    def shorten(
        self,
        method: TokenMethod,
        step: Step,
        x: Tensor,
        position: tuple[Tensor, ...],
        scores: Tensor | None,
        keys: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """Apply one step to all segments.

        Args:
            method: what is done.
            step: to how many.
            x: (R, D) rows of the sequence.
            position: rotary tables, (R, d) each, of the rows now.
            scores: (R,) float32.
            keys: (R, H, d).
            queries: (R, H, d).

        Returns:
            the rows left, (R', D), in the order of the sequence; ``x`` itself where nothing goes.
        """
        done = []
        for group in self.groups:
            picked = [None if t is None else group.take(t) for t in (scores, keys, queries)]
            done.append(group.state.step(method, step, group.take(x), *picked))
        if all(left is None for left in done):
            return x
        before = self.lengths
        self.lengths = list(before)
        for group, left in zip(self.groups, done, strict=True):
            if left is not None:
                for number in group.members:
                    self.lengths[number] = left.shape[1]
        starts = [0, *accumulate(self.lengths)]
        shorter = x.new_empty(starts[-1], x.shape[1])
        kept = torch.empty(starts[-1], dtype=torch.int64, device=x.device)
        for group, left in zip(self.groups, done, strict=True):
            rows = group.rows if left is None else group.rows.gather(1, group.state.kept_rows())
            part = group.take(x) if left is None else left
            first = _sent([starts[number] for number in group.members], x.device)
            if self.windows is None:
                rank = torch.arange(rows.shape[1], device=x.device).expand_as(rows)
            else:  # back to the order of the windows
                rank = rows.argsort(1).argsort(1)
            group.rows = first[:, None] + rank
            if group.whole:
                shorter, kept = part.flatten(0, 1), rows.flatten()
            else:
                shorter[group.rows.flatten()] = part.flatten(0, 1)
                kept[group.rows.flatten()] = rows.flatten()
            if group.state.key_bias is not None:
                group.bias = group.state.key_bias.repeat_interleave(self.group, 1)
        self.origin = kept if self.origin is None else self.origin[kept]
        self.position = tuple(table[kept] for table in position)
        self._seqlens, self._windows_left = {}, None
        return shorter

    def key_bias(self) -> Tensor | None:
        """(R',) float32 bias of each row's attention logit as a key, or None (ToMe's log sizes)."""
        if self.origin is None or all(group.bias is None for group in self.groups):
            return None
        bias = torch.zeros(len(self.origin), device=self.device)
        for group in self.groups:
            if group.bias is not None:
                bias[group.rows.flatten()] = group.bias.flatten()
        return bias

    def cells_left(self) -> Tensor:
        """(C',) int64: for each cell left, in the order of the sequence, where it stood in the sequence at first."""
        assert self.origin is not None
        return self.origin[:: self.group] // self.group


def _differences(bounds: Sequence[int]) -> list[int]:
    return [end - start for start, end in pairwise(bounds)]


def _sent(numbers: Sequence[int], device: torch.device) -> Tensor:
    """The numbers on ``device``, without waiting for what it is doing."""
    return torch.tensor(numbers).to(device, non_blocking=True)
