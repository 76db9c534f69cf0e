"""Any data set of (image, index mask) pairs: two folders a split, or a CSV of pairs."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from polymodal.errors import UserError
from polymodal.paths import natural_key, read_text_lines

from css.data.base import Item, SegData
from css.data.listing import IMAGE_SUFFIXES, check_share, names_in, need, with_share

__all__ = ["Pairs"]

_MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
_BACKGROUND = ("background", "_background_")
_MAX_NAMES = 254


@dataclass
class Pairs(SegData):
    """Pictures with index masks (0 background, 1..K classes, 255 ignored), and ``classes.txt`` with a name a line.

    Either folders, ``<root>/{train,val,test}/{images,masks}/`` with files of equal stems, or lists,
    ``<root>/{train,val,test}.csv`` with the columns ``image,mask`` (paths from the list's folder) and, where the names
    of image files are not unique, ``id``. Where a split has a list, the list is used. ``val`` may be missing.

    Args:
        root: the folder.
        classes: text file with the class names in the order of their ids, from 1; a first line ``background`` is id 0
            and no class. Default: ``<root>/classes.txt``.
        val_share: share of training pictures held out for validation, chosen by id, 0..1, where there is no ``val``.
    """

    classes: Path | None = None
    val_share: float = 0.0

    name: ClassVar[str] = "pairs"
    remedy: ClassVar[str] = (
        "give a folder with classes.txt and train/images, train/masks, test/images, test/masks or train.csv, test.csv"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.val_share)
        if self.classes is not None:
            self.classes = Path(self.classes).expanduser()

    def class_names(self) -> list[str]:
        """The names in ``classes.txt``.

        Raises:
            UserError: the file is missing or empty, or has an empty line, a name twice, or more than 254 names.
        """
        known: list[str] | None = self.__dict__.get("_names")
        if known is None:
            known = _read_names(self.classes or self.home() / "classes.txt")
            self.__dict__["_names"] = known
        return list(known)

    def read_split(self, split: str) -> list[Item]:
        """Pictures of a split: rows of the list, or files by name (2 before 10)."""
        if split == "val" and not self._has("val"):
            return with_share(self._read("train"), self.val_share, "val") if self.val_share else []
        if self.val_share and self._has("val"):
            raise UserError(
                f"data.val_share={self.val_share}, but {self.name} has validation pictures in {self.home() / 'val'};"
                " give one of the two"
            )
        items = self._read(split)
        return with_share(items, self.val_share, "train") if split == "train" else items

    def _has(self, split: str) -> bool:
        return (self.home() / f"{split}.csv").is_file() or (self.home() / split).is_dir()

    def _read(self, split: str) -> list[Item]:
        home = self.home()
        if not self._has(split):
            raise UserError(f"{self.name}: {home} has neither the folder {split} nor {split}.csv; {self.remedy}")
        listed = home / f"{split}.csv"
        return self._from_list(listed) if listed.is_file() else self._from_folders(home / split)

    def _from_list(self, path: Path) -> list[Item]:
        lines = read_text_lines(path, f"{self.name} list")
        rows = csv.DictReader(lines, skipinitialspace=True)
        rows.fieldnames = columns = [name.strip() for name in rows.fieldnames or []]
        if not {"image", "mask"} <= set(columns):
            raise UserError(f"{self.name} list: {path}, line 1: {','.join(columns)!r}; expected the columns image,mask")
        known: dict[Path, frozenset[str]] = {}
        seen: dict[str, int] = {}
        items = []
        for row in rows:
            where = f"{self.name} list {path}, line {rows.line_num}"
            item = _row(path.parent, row, where)
            if item.id in seen:
                raise UserError(
                    f"{where}: id {item.id} is also that of line {seen[item.id]}; add a column id with unique names"
                )
            seen[item.id] = rows.line_num
            for file in (item.image, item.mask):
                need(file, where, "mend or remove the line", known)
            items.append(item)
        return items

    def _from_folders(self, folder: Path) -> list[Item]:
        images = _stems(folder / "images", IMAGE_SUFFIXES, self.name, self.remedy)
        masks = _stems(folder / "masks", _MASK_SUFFIXES, self.name, self.remedy)
        lonely = sorted(images.keys() ^ masks.keys(), key=natural_key)
        if lonely:
            file, other = (images[lonely[0]], "mask") if lonely[0] in images else (masks[lonely[0]], "image")
            more = f" ({len(lonely)} such files)" if len(lonely) > 1 else ""
            raise UserError(f"{self.name}: {file} has no {other} of the same name{more}; add it or remove the file")
        return [Item(stem, images[stem], masks[stem]) for stem in sorted(images, key=natural_key)]


def _row(folder: Path, row: dict[str, str], where: str) -> Item:
    image, mask = ((row.get(column) or "").strip() for column in ("image", "mask"))
    if not image or not mask or None in row:
        raise UserError(f"{where}: expected a path in each of the columns image and mask; mend or remove the line")
    name = (row.get("id") or "").strip() or Path(image).stem
    if "/" in name or "\\" in name or name in {".", ".."}:
        raise UserError(f"{where}: id {name!r} is no file name; take out the slashes")
    return Item(name, folder / image, folder / mask)


def _stems(folder: Path, suffixes: tuple[str, ...], what: str, remedy: str) -> dict[str, Path]:
    """Files of a folder by stem; others (lists, thumbnails, hidden files) are passed over."""
    found: dict[str, Path] = {}
    for name in sorted(names_in(folder, f"{what} {folder.name}", remedy)):
        path = folder / name
        if name.startswith(".") or path.suffix.lower() not in suffixes:
            continue
        if path.stem in found:
            raise UserError(f"{what}: {found[path.stem]} and {path.name} have the same stem; keep one")
        found[path.stem] = path
    return found


def _read_names(path: Path) -> list[str]:
    names = [line.strip() for line in read_text_lines(path, "class names")]
    while names and not names[-1]:
        names.pop()
    first = 1
    if names and names[0].lower() in _BACKGROUND:
        del names[0]
        first = 2
    for number, name in enumerate(names, start=first):
        if not name:
            raise UserError(f"class names: {path}, line {number} is empty; ids are places in the list: fill it in")
        if name in names[: number - first]:
            raise UserError(f"class names: {path}, line {number}: {name!r} is there already; names must differ")
    if not 1 <= len(names) <= _MAX_NAMES:
        raise UserError(f"class names: {path} has {len(names)} names; expected 1..{_MAX_NAMES}, one a line")
    return names
