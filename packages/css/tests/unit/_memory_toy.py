"""A data set of a few small pictures for the memory's tests; run as a program, a build killed at a chosen point."""

import os
import signal
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
from css.data.base import Item, SegData
from css.memory import build
from css.memory.store import InstanceMemory
from css.task import Task
from PIL import Image

NAMES = ["ant", "bee", "cow", "dog"]
SIZE = (20, 24)


class Toy(SegData):
    """Pictures written by ``write``; all of them are training pictures."""

    name: ClassVar[str] = "toy"

    def __init__(self, root):
        super().__init__(root=root)

    def class_names(self):
        return NAMES

    def read_split(self, split):
        images = sorted((self.root / "images").rglob("*.png"))
        found = [Item(str(p.relative_to(self.root / "images"))[:-4], p, self.root / "masks" / p.name) for p in images]
        return found if split == "train" else []

    def class_sets(self, split):
        return [tuple(sorted(set(np.unique(self.load_mask(i)).tolist()) - {0, 255})) for i in self.items(split)]

    def fingerprint(self):
        return "toy-print"

    def item(self, name):
        return next(item for item in self.items("train") if item.id == name)


def write(root, pictures, seed=0):
    """Write pictures: name -> list of (raw id, top, left, height, width) rectangles, on noise."""
    rng = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for name, boxes in pictures.items():
        mask = np.zeros(SIZE, np.uint8)
        for raw, top, left, height, width in boxes:
            mask[top : top + height, left : left + width] = raw
        Image.fromarray(rng.integers(1, 256, (*SIZE, 3), np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    return Toy(root)


def many(per_class=6, classes=(1, 2, 3, 4)):
    """Pictures with one rectangle each; the picture's name says its class and number."""
    rng = np.random.default_rng(1)
    return {
        f"{NAMES[raw - 1]}{number}": [(raw, int(rng.integers(0, 8)), int(rng.integers(0, 8)), 6, 9)]
        for raw in classes
        for number in range(per_class)
    }


def facts(reader, task, step, **more):
    """Arguments of ``make_memory``."""
    common = {"reader": reader, "task": task, "fingerprint": reader.fingerprint(), "step": step, "setting": "overlap"}
    return {**common, "previous": None, "budget": 6, "seed": 5, "split_seed": 0, **more}


def main(root, folder, moment):
    """Replace the memory in ``folder`` by that of step 2, and be killed at ``moment``."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    rename, calls = Path.rename, []

    def counted(self, target):
        calls.append(target)
        if moment == f"before rename {len(calls)}":
            die()
        found = rename(self, target)
        if moment == f"after rename {len(calls)}":
            die()
        return found

    store, stored = build._store, []

    def counted_store(*arguments):
        stored.append(arguments)
        return die() if moment == "writing" and len(stored) == 2 else store(*arguments)

    Path.rename, build._store = counted, counted_store
    reader, task = Toy(Path(root)), Task("2-1", 4)
    previous = InstanceMemory.load(Path(folder))
    build.make_memory("instances", Path(folder), **facts(reader, task, 2, previous=previous, seed=7))
    sys.stdout.write("not killed\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
