"""Pictures of a step as samples whose every random draw is a function of (seed, epoch, picture)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from polymodal.errors import UserError
from polymodal.seeding import generator
from torch import Tensor
from torch.utils.data import Dataset

from css.data.base import Item, SegData
from css.data.batch import Sample
from css.data.files import check_sizes, read_mask
from css.data.options import LoaderConfig
from css.data.transforms import augment, draw_augmentation, fit, normalise, to_tensors
from css.task import BACKGROUND, IGNORE

__all__ = ["CSSDataset", "Decoded", "ReplayEntry"]

_SALIENT = 127


class ReplayEntry(Protocol):
    """What a memory entry must offer."""

    @property
    def id(self) -> str:
        """Id of the picture that it comes from."""

    def load(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Picture (H, W, 3) uint8, label (H, W) uint8 in channels, foreground (H, W) bool of an instance or None."""


@dataclass
class Decoded:
    """A picture as read from files.

    Args:
        image: (H, W, 3) uint8.
        label: (H, W) uint8: raw ids, or channels where it comes from the memory.
        foreground: (H, W) bool: what is kept of an instance; None: a whole picture.
        saliency: (H, W) uint8, where asked for.
    """

    image: np.ndarray
    label: np.ndarray
    foreground: np.ndarray | None = None
    saliency: np.ndarray | None = None


class CSSDataset(Dataset[Sample]):
    """Pictures with labels of one step, and after them the entries of a memory.

    A sample is asked for as ``(index, epoch)`` or, where a picture can come more than once in an epoch, as ``(index,
    epoch, occurrence)``. Its augmentation then does not depend on which worker loads it, or when.

    Args:
        reader: the data.
        items: its pictures.
        lut: (256,) uint8, raw id -> label: ``Task.train_lut`` or ``Task.test_lut``.
        config: loader options.
        train: augment at random, and read saliency maps where there are some; otherwise every epoch is the same.
        native: leave pictures at their size (evaluation).
        seed: root seed of the draws.
        replay: memory entries, with the indices ``len(items)`` and on.
        cache: keeps decoded pictures, by name; None: they are read anew each time.
    """

    def __init__(
        self,
        reader: SegData,
        items: Sequence[Item],
        lut: np.ndarray,
        config: LoaderConfig,
        *,
        train: bool = False,
        native: bool = False,
        seed: int = 0,
        replay: Sequence[ReplayEntry] = (),
        cache: dict[str, Decoded] | None = None,
    ) -> None:
        self.reader, self.items, self.config, self.seed = reader, list(items), config, seed
        self.train, self.native, self.cache = train, native, cache
        self.replay = list(replay)
        self.lut = lut.astype(np.int64)

    def __len__(self) -> int:
        return len(self.items) + len(self.replay)

    def __getitem__(self, key: tuple[int, ...] | int) -> Sample:
        """The sample at ``(index, epoch)`` or ``(index, epoch, occurrence)``; a bare index is epoch 0.

        Raises:
            UserError: a missing or broken file, an unknown id in a mask, or maps of another size, by name.
        """
        index, *when = key if isinstance(key, tuple) else (key, 0)
        if index < len(self.items):
            item = self.items[index]
            found = self._once(item.id, lambda: self._read(item))
            image, maps = self._transform(found, "augment", *when, item.id)
            label = torch.from_numpy(self.lut.take(maps[0].numpy()))
            return Sample(item.id, normalise(image), label, self._salient(maps))
        number = index - len(self.items)
        entry = self.replay[number]
        found = self._once(f"entry {number}", lambda: self._recall(entry))
        image, maps = self._transform(found, "augment entry", *when, entry.id, number)
        values, label = normalise(image), maps[0].long()
        if found.foreground is not None:
            inside = maps[1] > 0
            values *= inside  # mean colour around it
            label = torch.where(inside & (label != IGNORE), label, BACKGROUND)
        return Sample(entry.id, values, label, self._salient(maps), replayed=True)

    def _transform(self, found: Decoded, *names: str | int) -> tuple[Tensor, Tensor]:
        """Picture and its maps: label, then foreground, then saliency, as far as there are any."""
        planes = [found.label, found.foreground, found.saliency]
        image, maps = to_tensors(found.image, [plane for plane in planes if plane is not None])
        if self.native:
            return image, maps
        config = self.config
        if not self.train:
            return fit(image, maps, config.crop)
        height, width = found.label.shape
        draws = generator(self.seed, *names)
        draw = draw_augmentation(height, width, draws, scale=config.scale, ratio=config.ratio, flip=config.flip)
        return augment(image, maps, draw, config.crop)

    def _salient(self, maps: Tensor) -> Tensor | None:
        return maps[-1] > _SALIENT if self._wants_saliency else None

    @property
    def _wants_saliency(self) -> bool:
        return self.train and self.config.saliency is not None

    def _once(self, name: str, read: Callable[[], Decoded]) -> Decoded:
        if self.cache is None:
            return read()
        if name not in self.cache:
            self.cache[name] = read()
        return self.cache[name]

    def _read(self, item: Item) -> Decoded:
        image, mask = self.reader.load_image(item), self.reader.load_mask(item)
        check_sizes(item, image, mask)
        return Decoded(image, mask, saliency=self._saliency(item.id, mask.shape))

    def _recall(self, entry: ReplayEntry) -> Decoded:
        image, label, foreground = entry.load()
        return Decoded(image, label, foreground, self._saliency(entry.id, label.shape))

    def _saliency(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        folder = self.config.saliency
        if not self._wants_saliency or folder is None:
            return None
        path = folder.expanduser() / f"{name}.png"
        found = read_mask(path)
        if found.shape != shape:
            sizes = [f"{width} x {height}" for height, width in (found.shape, shape)]
            raise UserError(f"saliency map {path} has {sizes[0]} pixels, its picture {sizes[1]}; make it at that size")
        return found
