"""What every reader shares: pairs of image and index mask, class names, class sets. No torch: it is part of the CLI."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from polymodal.errors import UserError
from polymodal.paths import require_dir

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SPLITS", "Item", "SegData"]

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Item:
    """One picture with its mask.

    Args:
        id: name, unique within the data set.
        image: image file.
        mask: index mask: 0 background, 1..K classes, 255 ignored.
    """

    id: str
    image: Path
    mask: Path


@dataclass
class SegData:
    """Base class of the readers; a subclass fills in ``class_names`` and ``read_split``.

    Args:
        root: folder of the data set in its official layout.
        split_files: folder with ``{train,test}-step<N>.txt`` written by ``css-data prepare --out`` (with checksums):
            images of each step are taken from there instead of being selected by the setting.
    """

    root: Path | None = None
    split_files: Path | None = None

    name: ClassVar[str] = ""
    remedy: ClassVar[str] = "give the folder of the data set"
    """what to do where the root is missing, for messages"""

    def __post_init__(self) -> None:
        if self.root is not None:
            self.root = Path(self.root).expanduser()
        if self.split_files is not None:
            self.split_files = Path(self.split_files).expanduser()

    # --- what a subclass fills in -------------------------------------------------------------------------------

    def class_names(self) -> list[str]:
        """Names of the classes with raw ids 1..K."""
        raise NotImplementedError(f"{type(self).__name__}.class_names")

    def read_split(self, split: str) -> list[Item]:
        """Pictures of a split in file order; ``val`` may be empty."""
        raise NotImplementedError(f"{type(self).__name__}.read_split")

    def prepare(self) -> None:
        """Make what must exist before reading (the shapes world is written here); nothing for most readers."""

    # --- shared behaviour ---------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """K, without background."""
        return len(self.class_names())

    def home(self) -> Path:
        """The folder with the official layout.

        Raises:
            UserError: no root given, or it is no folder.
        """
        if self.root is None:
            raise UserError(f"{self.name}: no root folder; {self.remedy} (--data.root DIR)")
        return require_dir(self.root, f"{self.name} root", self.remedy)

    def items(self, split: str) -> list[Item]:
        """Pictures of a split, read once.

        Raises:
            UserError: unknown split, missing files, an id that occurs twice.
        """
        if split not in SPLITS:
            raise UserError(f"split {split!r}; expected one of {', '.join(SPLITS)}")
        known: dict[str, list[Item]] = self.__dict__.setdefault("_items", {})
        if split not in known:
            self.prepare()
            items = self.read_split(split)
            seen: set[str] = set()
            for item in items:
                if item.id in seen:
                    raise UserError(f"{self.name} {split}: {item.id} occurs twice; remove one of the two entries")
                seen.add(item.id)
            known[split] = items
        return known[split]

    def load_image(self, item: Item) -> np.ndarray:
        """Decode a picture: (H, W, 3) uint8 RGB.

        Raises:
            UserError: a missing or broken file, by name.
        """
        from css.data.files import read_image

        return read_image(item.image)

    def load_mask(self, item: Item) -> np.ndarray:
        """Decode a mask: (H, W) uint8 raw ids; palette files are read as indices.

        Raises:
            UserError: a missing or broken file, or an id that is neither 0..K nor 255, by name.
        """
        from css.data.files import read_mask

        return read_mask(item.mask, self.num_classes)

    def class_sets(self, split: str) -> list[tuple[int, ...]]:
        """Raw class ids (1..K, sorted) in each picture of a split, from the index cache; one parallel pass fills it.

        Raises:
            UserError: a broken mask, or one with an unknown id.
        """
        from css.data.index import class_sets

        return class_sets(self, split)

    def check(self) -> None:
        """Whether the layout is there.

        Raises:
            UserError: what is missing first.
        """
        if not self.items("train"):
            raise UserError(f"{self.name}: the training split is empty; {self.remedy}")
        if not self.items("test"):
            raise UserError(f"{self.name}: the test split is empty; {self.remedy}")

    def fingerprint(self) -> str:
        """Hash of ids and class sets of all splits: another data set or another annotation has another one."""
        digest = hashlib.sha256(repr(self.class_names()).encode())
        for split in SPLITS:
            items = self.items(split)
            sets = self.class_sets(split) if items else []
            digest.update(repr([(item.id, tuple(ids)) for item, ids in zip(items, sets, strict=True)]).encode())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Name, fingerprint and sizes, for the manifest."""
        sizes = {split: len(self.items(split)) for split in SPLITS}
        return {"name": self.name, "fingerprint": self.fingerprint(), "classes": self.num_classes, "images": sizes}
