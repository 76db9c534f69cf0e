"""PASCAL VOC 2012, with or without the augmented masks of SBD, in its official layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from polymodal.errors import UserError
from polymodal.paths import read_text_lines, require_files

from css.data.base import Item, SegData
from css.data.listing import check_share, names_in, need, with_share
from css.data.names import VOC_NAMES

__all__ = ["VOC"]

_INSIDE = ("", "VOC2012", "VOCdevkit/VOC2012")
_AUGMENTED_LISTS = ("train_aug.txt", "trainaug.txt")


@dataclass
class VOC(SegData):
    """PASCAL VOC 2012: 20 classes; 10,582 training pictures (1,464 without SBD), 1,449 test pictures.

    ``<root>/[VOCdevkit/][VOC2012/]{JPEGImages/*.jpg, SegmentationClassAug/*.png, SegmentationClass/*.png}`` and
    ``ImageSets/Segmentation/{train_aug,train,val}.txt``. A line of a list is an id, or the pair
    ``/JPEGImages/ID.jpg /SegmentationClassAug/ID.png``. The official val set is the test set, as in all published
    work; validation pictures are held out of the training set.

    Args:
        root: ``VOC2012``, ``VOCdevkit``, or the folder that holds either.
        augmented: train on the list ``train_aug.txt`` (or ``trainaug.txt``) and take masks from
            ``SegmentationClassAug``, test masks from ``SegmentationClass`` where the former has none; else
            ``train.txt`` and ``SegmentationClass`` alone.
        val_share: share of training pictures held out for validation, chosen by id, 0..1.
    """

    augmented: bool = True
    val_share: float = 0.0

    name: ClassVar[str] = "voc"
    remedy: ClassVar[str] = "give the folder VOC2012 of the official archive, or the one that holds it"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.val_share)

    def class_names(self) -> list[str]:
        """The 20 names; raw ids are their places from 1."""
        return list(VOC_NAMES)

    def home(self) -> Path:
        """The folder with ``JPEGImages`` and ``ImageSets``.

        Raises:
            UserError: no root given, or it holds no VOC2012.
        """
        root = super().home()
        for candidate in (root / inside for inside in _INSIDE):
            if (candidate / "ImageSets" / "Segmentation").is_dir():
                return candidate
        require_files(root, ["ImageSets/Segmentation"], f"{self.name} root", self.remedy)
        return root  # pragma: no cover - the line above raises unless the folder appeared this instant

    def read_split(self, split: str) -> list[Item]:
        """Pictures of a split; ``test`` is the official val list, ``val`` what ``val_share`` holds out."""
        if split == "test":
            return self._read("val.txt")
        if split == "val" and not self.val_share:
            return []
        return with_share(self._read(self._train_list()), self.val_share, split)

    def _train_list(self) -> str:
        if not self.augmented:
            return "train.txt"
        lists = self.home() / "ImageSets" / "Segmentation"
        for name in _AUGMENTED_LISTS:
            if (lists / name).is_file():
                return name
        raise UserError(
            f"{self.name}: {lists / _AUGMENTED_LISTS[0]} is missing; copy it and the folder SegmentationClassAug"
            " there, or train on the 1,464 official pictures with --data.augmented false"
        )

    def _read(self, name: str) -> list[Item]:
        home = self.home()
        path = home / "ImageSets" / "Segmentation" / name
        known: dict[Path, frozenset[str]] = {}
        items = []
        for number, line in enumerate(read_text_lines(path, f"{self.name} list"), start=1):
            if not line.strip():
                continue
            where = f"{self.name} list {path}, line {number}"
            item = self._item(home, line.split(), where, known)
            need(item.image, where, "unpack the archive again or remove the line", known)
            need(item.mask, where, self._mask_remedy(item), known)
            items.append(item)
        if not items:
            raise UserError(f"{self.name} list: {path} has no lines; copy it again from the archive")
        return items

    def _item(self, home: Path, cells: list[str], where: str, known: dict[Path, frozenset[str]]) -> Item:
        if len(cells) == 2 and all("/" in cell for cell in cells):
            image, mask = (_below(home, cell) for cell in cells)
            return Item(image.stem, image, mask)
        if len(cells) != 1 or "/" in cells[0]:
            raise UserError(
                f"{where}: {' '.join(cells)!r}; expected ID, or /JPEGImages/ID.jpg /SegmentationClassAug/ID.png"
            )
        (name,) = cells
        return Item(name, home / "JPEGImages" / f"{name}.jpg", self._mask(home, name, known))

    def _mask(self, home: Path, name: str, known: dict[Path, frozenset[str]]) -> Path:
        """Mask of a bare id: the augmented one where it is wanted and there."""
        plain, augmented = home / "SegmentationClass", home / "SegmentationClassAug"
        if not self.augmented:
            return plain / f"{name}.png"
        for folder in (augmented, plain):
            if folder not in known:
                known[folder] = names_in(folder, f"{self.name} masks", self.remedy) if folder.is_dir() else frozenset()
            if f"{name}.png" in known[folder]:
                return folder / f"{name}.png"
        return augmented / f"{name}.png"

    def _mask_remedy(self, item: Item) -> str:
        if item.mask.parent.name == "SegmentationClassAug":
            return "copy SegmentationClassAug there, or use the official masks alone with --data.augmented false"
        return "unpack the archive again or remove the line"


def _below(home: Path, cell: str) -> Path:
    """Path of a list entry: it starts with a slash but means the data set, whose own name may lead."""
    parts = [part for part in PurePosixPath(cell).parts if part != "/"]
    while parts and parts[0] in ("VOCdevkit", "VOC2012", "."):
        del parts[0]
    return home.joinpath(*parts)
