"""Pictures of several tiles and frames of videos behind LLaVA's projector: which placeholder rows stay, and their maps.

The geometry comes from the model's own packing code (``anyres``); the survivors come from the tower. Both layouts of
``llava`` meet here: ``scatter`` asks which rows of the full packing stay, ``pseudo_grid`` packs a smaller grid with the
same code and spreads its rows over the full one.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from polymodal.errors import UserError

from vlm_accel.encoders.anyres import Packing, spread
from vlm_accel.encoders.layout import owners
from vlm_accel.encoders.records import joined_step, splice, vision_steps
from vlm_accel.merge_map import MergeMap

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.encoders.features import Survivors
    from vlm_accel.encoders.surgery import BatchedCall

__all__ = ["Current", "Grids", "Picture"]


@dataclass(frozen=True)
class Picture:
    """What some tiles of a tower call belong to.

    Args:
        kind: ``plain`` (an image without newline), ``tiles`` (a base and perhaps tiles, newlines), ``frame``.
        shape: (rows, columns) of tiles behind the base; (0, 0): only the base.
        size: (height, width) in pixels, for unpadding.
        options: further arguments of the model's packing code.
    """

    kind: str = "plain"
    shape: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def tiles(self) -> int:
        """Tiles, the base among them."""
        return 1 + self.shape[0] * self.shape[1]


@dataclass
class Current:
    """The get_image_features or get_video_features call that is running.

    Args:
        kind: image or video.
        front: rows in front of the patches that reach the language model (strategy "full" of an encoder with CLS).
        pictures: what the tiles of the tower call belong to, in order; None: each tile is a plain picture.
        frames: of each video; 0: images.
        left: what survived; set by the projector's hooks.
        small: pseudo grids are made of the projected survivors.
    """

    kind: str
    front: int
    pictures: list[Picture] | None
    frames: int = 0
    left: Survivors | None = None
    small: bool = False

    def split(self, images: int) -> list[tuple[Picture, int]]:
        """(picture, its first tile) of a call with that many tiles."""
        pictures = self.pictures or [Picture()] * images
        starts = np.cumsum([0] + [picture.tiles for picture in pictures])
        return [(picture, int(start)) for picture, start in zip(pictures, starts, strict=False)]


class Grids:
    """Packings of one model, made once for each kind of picture.

    Args:
        inner: the model, with ``pack_image_features`` and, for videos, ``apply_pooling``; others have plain pictures.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._known: dict[tuple[Picture, tuple[int, int]], Packing] = {}
        self._targets: dict[tuple[Picture, tuple[int, int], tuple[int, int], Any], tuple[Tensor, Tensor]] = {}

    def shape_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tiles that the model cuts a picture of ``size`` into."""
        config = self.inner.config
        module = sys.modules[type(self.inner).__module__]
        shape = module.get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        return int(shape[0]), int(shape[1])

    def packing(self, picture: Picture, side: tuple[int, int]) -> Packing:
        """The packing of ``picture`` with tiles of ``side`` patches."""
        key = (picture, side)
        if key not in self._known:
            self._known[key] = Packing.of(
                lambda features, newline: self.pack(picture, side, features, newline), side, picture.shape,
                picture.kind == "frame",
            )  # fmt: skip
        return self._known[key]

    def pack(self, picture: Picture, side: tuple[int, int], features: Tensor, newline: Tensor) -> Tensor:
        """The model's own code on tiles of ``side`` patches: (tiles, N, C) -> (P, C)."""
        cls: Any = type(self.inner)
        if picture.kind == "plain":
            return features[0]
        view = self._view(picture, side)
        if picture.kind == "frame":
            return cls.apply_pooling(view, features)[0]
        try:
            made = cls.pack_image_features(
                view, [features], [picture.size], image_newline=newline, **dict(picture.options)
            )
        except RuntimeError as error:
            height, width = picture.size
            raise UserError(
                f"a picture of {height} x {width} pixels cannot be packed with {side[0]} x {side[1]} patches a tile "
                f"({str(error).splitlines()[0]}); keep more patches, or use layout='scatter'"
            ) from None
        packed: Tensor = made[0][0]
        return packed

    def pool(self, features: Tensor, side: tuple[int, int]) -> Tensor:
        """The model's pooling of frames (F, N, C) of ``side`` patches."""
        cls: Any = type(self.inner)
        pooled: Tensor = cls.apply_pooling(self._view(Picture("frame"), side), features)
        return pooled

    def _view(self, picture: Picture, side: tuple[int, int]) -> Any:
        """What the packing code reads of the model, for tiles of that many patches."""
        vision = SimpleNamespace(image_size=side[0], patch_size=1)
        points = [[picture.shape[0] * side[0], picture.shape[1] * side[1]]]
        return SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=points))

    def cells(self, picture: Picture, side: tuple[int, int], counts: list[int]) -> int:
        """How many pooled cells stay (iLLaVA 3.6): what a square grid of the survivors would give.

        Where their number is no square, the full grid's lines and columns times sqrt(share left), rounded up for
        frames (as pooling does) and down for pictures.
        """
        full = self.packing(picture, side)
        total = full.size[0] * full.size[1]
        patches = side[0] * side[1]
        counted = counts[1:] if len(counts) > 1 else counts
        root = math.isqrt(counted[0])
        if all(count == counted[0] for count in counted) and root * root == counted[0] > 0:
            try:
                small = self.packing(picture, (root, root)).size
                return min(total, max(1, small[0] * small[1]))
            except UserError:  # the grid would be pooled to nothing: as if it were no square
                pass
        share = math.sqrt(sum(counted) / (patches * len(counted)))
        if picture.kind == "frame":
            sides = [math.ceil(round(length * share / 2, 6)) for length in side]
        else:
            sides = [int(length * share + 1e-6) for length in full.size]
        return min(total, max(1, sides[0]) * max(1, sides[1]))

    # ---- rows

    def segments(self, current: Current, call: BatchedCall) -> list[int]:
        """Placeholder rows of each segment: a picture with its tiles, or a frame (the last one with the newline)."""
        grid = call.state.grid
        assert grid is not None
        split = current.split(call.state.images)
        sizes = [self.packing(picture, grid).rows + current.front for picture, _ in split]
        for last in _ends(current, len(sizes)):
            sizes[last] += 1
        return sizes

    def rows(self, current: Current, call: BatchedCall) -> Tensor:
        """(P,) bool: placeholder rows that stay."""
        grid = call.state.grid
        assert current.left is not None
        assert grid is not None
        split = current.split(call.state.images)
        parts = self._small_rows(split, current, grid) if current.small else self._full_rows(split, current, call)
        if current.front:
            parts = [torch.nn.functional.pad(part, (current.front, 0), value=True) for part in parts]
        for last in _ends(current, len(parts)):
            parts[last] = torch.nn.functional.pad(parts[last], (0, 1), value=True)
        return torch.cat(parts)

    def _full_rows(self, split: list[tuple[Picture, int]], current: Current, call: BatchedCall) -> list[Tensor]:
        left, grid = current.left, call.state.grid
        assert left is not None
        assert grid is not None
        images, n = call.state.images, call.patches
        index = left.flat(n)
        alive = torch.zeros(images * n, device=index.device).index_fill(0, index, 1.0).view(images, n)
        score = left.score
        parts = []
        if len({picture for picture, _ in split}) == 1 and split[0][0].tiles == 1 and left.even:
            picture = split[0][0]
            cells = self.cells(picture, grid, left.counts[:1]) if self.packing(picture, grid).pooled else 0
            return list(self.packing(picture, grid).alive(alive, score, cells))
        for picture, first in split:
            part = slice(first, first + picture.tiles)
            packing = self.packing(picture, grid)
            cells = self.cells(picture, grid, left.counts[part]) if packing.pooled else 0
            own = None if score is None else score[part].flatten()
            parts.append(packing.alive(alive[part].flatten(), own, cells))
        return parts

    def _small_rows(self, split: list[tuple[Picture, int]], current: Current, grid: tuple[int, int]) -> list[Tensor]:
        assert current.left is not None
        assert isinstance(current.left.index, torch.Tensor)
        device = current.left.index.device
        side = self.square(current.left)
        parts = []
        for picture, _ in split:
            none = torch.zeros(self.packing(picture, grid).rows, dtype=torch.bool, device=device)
            parts.append(none.index_fill(0, self.targets(picture, side, grid, device)[1], True))
        return parts

    # ---- pseudo grids

    def square(self, left: Survivors) -> tuple[int, int]:
        """Side of the square grid of the survivors.

        Raises:
            UserError: their number is no square, or differs between tiles.
        """
        root = math.isqrt(left.counts[0])
        if not left.even or root * root != left.counts[0]:
            shown = left.counts[0] if left.even else sorted(set(left.counts))
            raise UserError(
                f"layout='pseudo_grid' needs a square number of patches left in every tile, not {shown}; use steps "
                f"that leave {root * root}, or layout='scatter'"
            )
        return root, root

    def targets(
        self, picture: Picture, side: tuple[int, int], grid: tuple[int, int], device: Any
    ) -> tuple[Tensor, Tensor]:
        """Rows of the small packing that are placed, and the rows of the full one that carry them; on the device."""
        key = (picture, side, grid, device)
        if key not in self._targets:
            found = spread(self.packing(picture, side), self.packing(picture, grid), side, grid)
            chosen = np.flatnonzero(found >= 0)
            self._targets[key] = torch.from_numpy(chosen).to(device), torch.from_numpy(found[chosen]).to(device)
        return self._targets[key]

    def placed(self, picture: Picture, side: tuple[int, int], grid: tuple[int, int], small: Tensor) -> Tensor:
        """Rows (..., P_small, C) of a small packing at their places in the full one, zeros elsewhere."""
        full = small.new_zeros(*small.shape[:-2], self.packing(picture, grid).rows, small.shape[-1])
        chosen, places = self.targets(picture, side, grid, small.device)
        return full.index_copy(-2, places, small.index_select(-2, chosen))

    # ---- maps

    def maps(self, current: Current, call: BatchedCall, layer: int, rows: Tensor) -> list[MergeMap]:
        """One map a segment, from its patches to its placeholder rows that stay (trace only).

        Args:
            current: what has run.
            call: the tower's.
            layer: block whose output the model reads.
            rows: (P,) bool of the call.
        """
        left, grid = current.left, call.state.grid
        assert left is not None
        assert grid is not None
        alive, start, made = rows.cpu().numpy(), 0, []
        for number, (picture, first) in enumerate(current.split(call.state.images)):
            tiles = list(range(first, first + picture.tiles))
            steps = vision_steps(call, tiles)
            if left.features is not None:
                parts = [left.features[tile] for tile in tiles]
                steps.append(joined_step("features", layer, [(_zeros(one.assign), one) for one in parts]))
            size = self.packing(picture, grid).rows
            ends = int(current.frames > 0 and (number + 1) % current.frames == 0)
            own = alive[start : start + current.front + size + ends]
            steps.append(self._splice(current, call, picture, tiles, layer, own))
            made.append(MergeMap((len(tiles), *grid), call.state.prefix, 1, steps))
            start += len(own)
        return made

    def _splice(
        self, current: Current, call: BatchedCall, picture: Picture, tiles: list[int], layer: int, alive: np.ndarray
    ) -> Any:
        left, grid = current.left, call.state.grid
        assert left is not None
        assert grid is not None
        counts = [left.counts[tile] for tile in tiles]
        if current.small:
            side = self.square(left)
            packing = self.packing(picture, side)
            chosen = self.targets(picture, side, grid, call.state.index.device)[0].cpu().numpy()
            extra = len(alive) - self.packing(picture, grid).rows - current.front
            alive = np.ones(packing.rows + current.front + extra, bool)
            alive[current.front : current.front + packing.rows] = np.isin(np.arange(packing.rows), chosen)
            row_of = np.arange(sum(counts))
        else:
            packing = self.packing(picture, grid)
            row_of = _row_of(left, tiles, counts, call.patches, grid, packing.pooled)
        extra = len(alive) - packing.rows - current.front
        pad = ((current.front, extra), (0, 0))
        source, weight = np.pad(packing.source, pad), np.pad(packing.weight, pad)
        return splice(layer, alive, source, weight, row_of, sum(counts))


def _ends(current: Current, parts: int) -> range:
    """Frames that end a video: its newline stands behind them."""
    return range(current.frames - 1, parts, current.frames) if current.frames else range(0)


def _row_of(
    left: Survivors, tiles: list[int], counts: list[int], patches: int, grid: tuple[int, int], filled: bool
) -> np.ndarray:
    """(tiles * N,) int64 survivor (tile after tile) at or, where cells are filled, standing in for each patch."""
    found = np.full((len(tiles), patches), -1, np.int64)
    start = 0
    for number, (tile, count) in enumerate(zip(tiles, counts, strict=True)):
        index = left.index[tile]
        if filled and count:
            owner = None if left.owner is None else left.owner[tile : tile + 1]
            found[number] = owners(index[None], owner, grid)[0].cpu().numpy() + start
        else:
            found[number, index.cpu().numpy()] = np.arange(count) + start
        start += count
    return found.ravel()


def _zeros(like: Tensor | None) -> Tensor:
    assert like is not None, "methods give assign where a trace is wanted"
    return torch.zeros(like.shape, device=like.device)
