"""Pasting written out pixel by pixel in float64 NumPy, from the text of the method; torch is not used."""

from dataclasses import dataclass

import numpy as np


def nearest(size, scale):
    """Source pixel of each output pixel when ``size`` pixels are resized by ``scale``; the step is a 32-bit number.

    torch copies an axis that keeps its length and repeats each pixel of one that doubles, whatever the scale.
    """
    out = int(size * scale)
    step = {size: np.float32(1), 2 * size: np.float32(0.5)}.get(out, np.float32(1 / scale))
    return [min(int(np.floor(np.float32(place) * step)), size - 1) for place in range(out)]


def paste(image, target, instance, mask, cls, origin, cell, lam, enlarge=True):
    image, target = np.array(image, np.float64), np.array(target, np.float64)
    height, width = image.shape[1:]
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0 or rows[0] == rows[-1] or columns[0] == columns[-1]:
        return image, target
    y0, y1, x0, x1 = int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])
    scale = min(cell / (x1 - x0 + 2), cell / (y1 - y0 + 2))
    if not enlarge and scale > 1:
        scale = 1.0
    down, across = nearest(y1 - y0 + 1, scale), nearest(x1 - x0 + 1, scale)
    i = origin[0] if origin[0] + len(down) <= height else height - 1 - len(down)
    j = origin[1] if origin[1] + len(across) <= width else width - 1 - len(across)
    for r, source_row in enumerate(down):
        for c, source_column in enumerate(across):
            share = lam * bool(mask[y0 + source_row, x0 + source_column])
            color = np.asarray(instance[:, y0 + source_row, x0 + source_column], np.float64)
            image[:, i + r, j + c] = share * color + (1 - share) * image[:, i + r, j + c]
            target[:, i + r, j + c] *= 1 - share
            target[cls, i + r, j + c] += share
    return image, target


def rank(mask, cell):
    height, width = mask.shape
    cells = [
        ((i, j), int((~mask[i : i + cell, j : j + cell]).sum()))
        for i in range(0, height - cell + 1, cell)
        for j in range(0, width - cell + 1, cell)
    ]
    return sorted(cells, key=lambda found: -found[1])  # sorted() keeps the order of ties


@dataclass
class Entry:
    """What a bank needs of a memory's entry."""

    image: np.ndarray
    label: np.ndarray
    box: tuple[int, int, int, int]
    size: tuple[int, int]
    slot: int

    def crop(self):
        return self.image, self.label

    def whole(self):
        """Picture (H, W, 3), with the nearest stored pixel outside of the box, and label (H, W), with 0 there."""
        top, left, height, width = self.box
        rows = np.clip(np.arange(self.size[0]) - top, 0, height - 1)
        columns = np.clip(np.arange(self.size[1]) - left, 0, width - 1)
        label = np.zeros(self.size, np.uint8)
        label[top : top + height, left : left + width] = self.label
        return self.image[rows][:, columns], label


@dataclass
class Memory:
    entries: list


def random_memory(rng, sizes, classes=3):
    """Entries with blobs of one or two classes in random boxes of pictures of the given sizes."""
    entries = []
    for height, width in sizes:
        h, w = int(rng.integers(2, height + 1)), int(rng.integers(2, width + 1))
        box = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
        slot = int(rng.integers(1, classes + 1))
        label = np.where(rng.random((h, w)) < rng.choice([0.05, 0.7, 1.0]), slot, 0).astype(np.uint8)
        label[rng.random((h, w)) < 0.2] = slot % classes + 1
        entries.append(Entry(rng.integers(0, 256, (h, w, 3), np.uint8), label, box, (height, width), slot))
    return Memory(entries)
