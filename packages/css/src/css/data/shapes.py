"""A small world of textured shapes, several in a picture, so that old classes occur unlabelled in new pictures.

One to three shapes of any classes lie on a textured background. Classes differ in outline, colour and pattern; colours
of single shapes scatter so widely that no pixel tells its class alone. Nothing is downloaded: the world is written once
as PNG files in the layout that :class:`css.data.pairs.Pairs` reads too, and then read like any other data set.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from polymodal.errors import UserError
from polymodal.paths import cache_dir

from css.data.base import SPLITS, Item, SegData

__all__ = ["KINDS", "Shapes"]

KINDS = ("disc", "square", "triangle", "cross", "ring", "bar", "half_disc", "star")
"""Names of the classes, in the order of their raw ids."""
_WORLD_VERSION = 1
_SMALLEST = 32
_log = logging.getLogger(__name__)


@dataclass
class Shapes(SegData):
    """The shapes world; written on first use into the user's cache (``$POLYMODAL_CACHE``).

    Args:
        root: folder for worlds; default: the user's cache. Each set of options has its own sub-folder.
        split_files: folder of split files written by css-data prepare --out.
        images: pictures in train, val and test.
        size: height and width, pixels, at least 32.
        classes: the first so many of the eight shapes, 2..8.
        noise: standard deviation of the pixel noise, 0..1 in units of the full brightness.
        scatter: standard deviation of a shape's colour about its class's, 0..1; less makes classes easier to tell.
        most: most shapes a picture, 1..3; with 1, classes never meet, and nothing of an old class is in new pictures.
        world_seed: seed of the pictures; the seed of a run does not change the data.
    """

    images: tuple[int, int, int] = (480, 120, 150)
    size: int = 64
    classes: int = 4
    noise: float = 0.06
    scatter: float = 0.11
    most: int = 3
    world_seed: int = 0

    name: ClassVar[str] = "shapes"
    remedy: ClassVar[str] = "give numbers of pictures above 0 (--data.images)"

    def options(self) -> dict[str, Any]:
        """What the world depends on.

        Raises:
            UserError: an option out of range.
        """
        if len(self.images) != 3 or min(self.images) < 1:
            raise UserError(f"images={list(self.images)}; expected three numbers of at least 1, e.g. [480, 120, 150]")
        if self.size < _SMALLEST:
            raise UserError(f"size={self.size}; expected at least {_SMALLEST} pixels: up to three shapes lie in it")
        if not 2 <= self.classes <= len(KINDS):
            raise UserError(f"classes={self.classes}; expected 2..{len(KINDS)}: {', '.join(KINDS)}")
        for name in ("noise", "scatter"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}; expected 0..1 in units of the full brightness")
        if not 1 <= self.most <= 3:
            raise UserError(f"most={self.most}; expected 1..3 shapes a picture")
        return {
            "version": _WORLD_VERSION,
            "seed": self.world_seed,
            "images": list(self.images),
            "size": self.size,
            "classes": self.classes,
            "noise": self.noise,
            "scatter": self.scatter,
            "most": self.most,
        }

    def world(self) -> Path:
        """Folder of this world; it may not exist yet."""
        key = hashlib.sha256(json.dumps(self.options(), sort_keys=True).encode()).hexdigest()[:12]
        base = self.root if self.root is not None else cache_dir("css", "worlds")
        return base / f"shapes-{key}"

    def home(self) -> Path:
        """The folder of this world."""
        return self.world()

    def class_names(self) -> list[str]:
        """Names of the shapes."""
        return list(KINDS[: self.options()["classes"]])

    def prepare(self) -> None:
        """Write the world unless it is there; another process doing the same at the same time does no harm.

        Raises:
            UserError: the folder cannot be written, or holds something else.
        """
        world = self.world()
        if world.is_dir():
            if not (world / "world.json").is_file():
                raise UserError(f"shapes world: {world / 'world.json'} is missing; remove the folder, it is made again")
            return
        start = time.monotonic()
        _log.info("writing the shapes world into %s (%d pictures)", world, sum(self.images))
        try:
            world.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=world.parent, prefix=f".{world.name}."))
        except OSError as error:
            raise UserError(
                f"shapes world: cannot write into {world.parent} ({error.strerror}); choose another folder with"
                " --data.root DIR or the environment variable POLYMODAL_CACHE"
            ) from error
        try:
            from css.data.world import write_world

            write_world(temporary, self.options())
            temporary.chmod(0o755)
            try:
                temporary.rename(world)
            except OSError:
                if not world.is_dir():  # else another process was faster, and its world is the same
                    raise
        except OSError as error:
            raise UserError(f"shapes world: cannot write {temporary} ({error.strerror}); free some space") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _log.info("shapes world written in %.1f s", time.monotonic() - start)

    def read_split(self, split: str) -> list[Item]:
        """Pictures of a split; their number is an option, so no folder is listed."""
        folder = self.world() / split
        names = [f"shapes-{split}-{number:05d}" for number in range(self.images[SPLITS.index(split)])]
        return [Item(name, folder / "images" / f"{name}.png", folder / "masks" / f"{name}.png") for name in names]

    def fingerprint(self) -> str:
        """Hash of the options beside ids and class sets: worlds of another noise have the same class sets."""
        text = json.dumps(self.options(), sort_keys=True) + super().fingerprint()
        return hashlib.sha256(text.encode()).hexdigest()[:16]
