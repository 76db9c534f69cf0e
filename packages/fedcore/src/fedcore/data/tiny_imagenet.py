"""Tiny-ImageNet in its official layout; decoded once into the user's cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from polymodal.errors import UserError
from polymodal.paths import natural_key, read_text_lines, require_dir, require_files

from fedcore.data.array_type import ArrayData
from fedcore.data.images import ImageData
from fedcore.data.picture_cache import cached_pictures, open_picture

if TYPE_CHECKING:
    import numpy as np

__all__ = ["TinyImageNet"]

_SIDE = 64


@dataclass
class TinyImageNet(ImageData):
    """Tiny-ImageNet: 100,000 + 10,000 pictures of 200 classes, 3x64x64; random crop (padding 4) and flip in training.

    ``<root>/[tiny-imagenet-200/]{wnids.txt, words.txt, train/<wnid>/images/*.JPEG, val/images/*.JPEG,
    val/val_annotations.txt}``. The class number is the line in ``wnids.txt``, or the place in their sorted list, as in
    ILoRA's scripts. The test split is the official ``val`` folder; the pictures of the folder ``test`` have no labels
    and are not read.

    Args:
        root: ``tiny-imagenet-200``, or the folder that holds it.
        augment: random crop (padding 4) and flip in training.
        image_size: as for all pictures.
        class_order: ``wnids``, by line of that file, or ``sorted``.
    """

    class_order: Literal["wnids", "sorted"] = "wnids"

    name: ClassVar[str] = "tiny_imagenet"
    remedy: ClassVar[str] = "unpack tiny-imagenet-200.zip and give the folder tiny-imagenet-200"
    mean: ClassVar[tuple[float, ...]] = (0.4802, 0.4481, 0.3975)
    std: ClassVar[tuple[float, ...]] = (0.2302, 0.2265, 0.2262)

    def home(self) -> Path:
        """The folder with ``wnids.txt``: the root, or the official folder in it."""
        root = super().home()
        inside = root / "tiny-imagenet-200"
        return inside if inside.is_dir() and not (root / "wnids.txt").is_file() else root

    def wnids(self) -> list[str]:
        """WordNet ids in the order of the class numbers.

        Raises:
            UserError: the list is missing, empty, or has an id twice.
        """
        path = self.home() / "wnids.txt"
        ids = [line.strip() for line in read_text_lines(path, f"{self.name} list", self.remedy) if line.strip()]
        if not ids or len(set(ids)) != len(ids):
            raise UserError(f"{self.name}: {path} is empty or has an id twice; unpack it again from the archive")
        if self.class_order not in ("wnids", "sorted"):
            raise UserError(f"class_order={self.class_order!r}; expected wnids or sorted")
        return sorted(ids) if self.class_order == "sorted" else ids

    def class_names(self) -> list[str]:
        """The first word for each id, from ``words.txt``; the ids themselves where that is missing."""
        known: dict[str, list[str]] = self.__dict__.setdefault("_names", {})
        if not known:
            words, path = {}, self.home() / "words.txt"
            if path.is_file():
                rows = (line.partition("\t") for line in read_text_lines(path, f"{self.name} words"))
                words = {wnid: text.split(",")[0].strip() for wnid, _, text in rows}
            known["names"] = [words.get(wnid) or wnid for wnid in self.wnids()]
        return known["names"]

    def read_split(self, split: str) -> ArrayData:
        """(N, 3, 64, 64) uint8, from the cache where the files are those it was made of.

        Raises:
            UserError: a missing or broken file, or an unknown class.
        """
        import numpy as np

        files, labels = self._train_files() if split == "train" else self._val_files()
        pictures = cached_pictures(self.name, split, files, labels, _SIDE, _picture, self.remedy)
        return self.pictures(pictures, np.asarray(labels, dtype=np.int64), split)

    def _train_files(self) -> tuple[list[Path], list[int]]:
        home, files, labels = self.home(), [], []
        for number, wnid in enumerate(self.wnids()):
            folder = require_dir(home / "train" / wnid / "images", f"{self.name} pictures", self.remedy)
            found = sorted(
                (path for path in folder.iterdir() if path.suffix == ".JPEG"), key=lambda p: natural_key(p.name)
            )
            if not found:
                raise UserError(f"{self.name}: {folder} has no .JPEG files; {self.remedy}")
            files += found
            labels += [number] * len(found)
        return files, labels

    def _val_files(self) -> tuple[list[Path], list[int]]:
        folder, number_of = self.home() / "val", {wnid: number for number, wnid in enumerate(self.wnids())}
        path, files, labels = folder / "val_annotations.txt", [], []
        for number, line in enumerate(read_text_lines(path, f"{self.name} labels", self.remedy), start=1):
            cells = line.split("\t")
            if len(cells) < 2 or cells[1] not in number_of:
                raise UserError(
                    f"{self.name}: {path}, line {number}: {line!r}; expected FILE, a wnid of wnids.txt, ..."
                )
            files.append(folder / "images" / cells[0])
            labels.append(number_of[cells[1]])
        require_files(folder / "images", [file.name for file in files], f"{self.name} pictures", self.remedy)
        return files, labels


def _picture(file: Path) -> np.ndarray:
    """(64, 64, 3) uint8."""
    picture = open_picture(file, "tiny_imagenet")
    if picture.shape != (_SIDE, _SIDE, 3):
        raise UserError(f"tiny_imagenet: {file} is {picture.shape[1]}x{picture.shape[0]}; expected {_SIDE}x{_SIDE}")
    return picture
