"""UPMC Food-101: photos of dishes and titles of the pages they stood on, 101 classes. No torch (the CLI)."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from polymodal.errors import UserError
from polymodal.paths import read_text_lines

from missing_modal.data.arrow import ArrowCell, columns
from missing_modal.data.base import Sample, Task
from missing_modal.data.files import Listing, read_json
from missing_modal.data.images import read_bytes
from missing_modal.data.published import Published

__all__ = ["Food101"]

_RAW = "unpack UPMC Food-101 and put class_idx.json, split.json and text.json of the official code beside images"
_IMAGE_SUFFIX = (".jpg", ".jpeg", ".png")
_log = logging.getLogger(__name__)


@dataclass
class Food101(Published):
    """UPMC Food-101, raw or as ``food101_{train,val,test}.arrow``.

    Raw: ``images/{train,test}/CLASS/CLASS_K.jpg`` (pictures of val lie in train), ``class_idx.json`` {class: number},
    ``split.json`` {train, val, test: [file]}, and the texts in ``text.json`` {file: text} or, without it, in
    ``texts/{train,test}_titles.csv`` (file, title, class; with or without a line of names). Files without a text are
    left out, as in the official code.

    Args:
        root: the folder.
        layout: auto takes the Arrow files where the root holds some.
    """

    name: ClassVar[str] = "food101"
    task: ClassVar[Task] = "multiclass"
    metric: ClassVar[str] = "accuracy"
    remedy: ClassVar[str] = "give the folder with images, class_idx.json and split.json, or with food101_train.arrow"
    counts: ClassVar[dict[str, int]] = {"train": 61142, "val": 6846, "test": 22716}
    """before files without a text are left out"""

    def official(self, split: str) -> str:
        """The split's name in the official files."""
        return split

    def class_names(self) -> list[str]:
        """Names in the order of ``class_idx.json``; from Arrow files alone, by the classes' file names."""
        known: list[str] | None = self.__dict__.get("_names")
        if known is None:
            known = _names(self._index()) if not self.is_arrow or self._index_file().is_file() else self._arrow_names()
            self.__dict__["_names"] = known
        return list(known)

    def read_raw(self, split: str) -> list[Sample]:
        """Samples of the files of ``split.json`` that have a text, in its order."""
        found, index = Listing(f"{self.name} {split}", _RAW), self._index()
        return [
            Sample(file, {"image": found.need(self._image(split, file)), "text": text}, _class(file, index))
            for file, text in self._texts_of(split)
        ]

    def read_arrow(self, split: str) -> list[Sample]:
        """Samples of the split's Arrow file, in its order."""
        path = self.arrow_file(split)
        held = columns(path, ("image", "text", "label", "image_id"))
        samples = []
        rows = zip(held["image_id"], held["text"], held["label"], strict=True)
        for number, (file, texts, label) in enumerate(rows):
            text = texts[0] if texts else None
            samples.append(Sample(str(file), {"image": ArrowCell(path, number), "text": text}, int(label)))
        return samples

    def arrow_rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Rows with the columns image, text, label, image_id, split."""
        found, index = Listing(f"{self.name} {split}", _RAW), self._index()
        for file, text in self._texts_of(split):
            yield {
                "image": read_bytes(found.need(self._image(split, file))),
                "text": [text],
                "label": _class(file, index),
                "image_id": file,
                "split": split,
            }

    def _index_file(self) -> Path:
        return self.home() / "class_idx.json"

    def _index(self) -> dict[str, int]:
        known: dict[str, int] | None = self.__dict__.get("_index_read")
        if known is None:
            path = self._index_file()
            known = read_json(path, self.name, _RAW)
            if sorted(known.values()) != list(range(len(known))):
                raise UserError(f"{self.name}: {path} must number {len(known)} classes from 0, each once; {_RAW}")
            self.__dict__["_index_read"] = known
        return known

    def _arrow_names(self) -> list[str]:
        """Class names that the file names of all splits tell."""
        index: dict[str, int] = {}
        for split in ("train", "val", "test"):
            held = columns(self.arrow_file(split), ("label", "image_id"))
            for file, label in zip(held["image_id"], held["label"], strict=True):
                name = _class_name(str(file))
                if index.setdefault(name, int(label)) != int(label):
                    raise UserError(
                        f"{self.arrow_file(split)}: {file} has the label {label}, others of its class {index[name]}; "
                        "write the files again with mm-data convert"
                    )
        if sorted(index.values()) != list(range(len(index))):
            raise UserError(
                f"{self.name}: the Arrow files do not show a file of every class; put class_idx.json beside them"
            )
        return _names(index)

    def _image(self, split: str, file: str) -> Path:
        name = file if file.lower().endswith(_IMAGE_SUFFIX) else f"{file}.jpg"
        return self.home() / "images" / ("test" if split == "test" else "train") / _class_name(file) / name

    def _texts_of(self, split: str) -> list[tuple[str, str]]:
        """Files of a split with their texts."""
        path = self.home() / "split.json"
        files = read_json(path, self.name, _RAW).get(split)
        if not isinstance(files, list):
            raise UserError(f"{self.name}: {path} has no list {split!r}; {_RAW}")
        texts = self._texts()
        held = [(str(file), texts[str(file)]) for file in files if str(file) in texts]
        if len(held) < len(files):
            _log.info("%s %s: %d of %d files have no text and are left out", self.name, split, len(files) - len(held),
                      len(files))  # fmt: skip
        return held

    def _texts(self) -> dict[str, str]:
        known: dict[str, str] | None = self.__dict__.get("_texts_read")
        if known is None:
            path = self.home() / "text.json"
            known = read_json(path, self.name, _RAW) if path.is_file() else self._titles()
            wrong = next((file for file, text in known.items() if not isinstance(text, str)), None)
            if wrong is not None:
                raise UserError(f"{self.name}: {path}: the text of {wrong} is no string; {_RAW}")
            self.__dict__["_texts_read"] = known
        return known

    def _titles(self) -> dict[str, str]:
        """Texts of the two lists of titles."""
        texts: dict[str, str] = {}
        for part in ("train", "test"):
            path = self.home() / "texts" / f"{part}_titles.csv"
            if not path.is_file():
                raise UserError(f"{self.name}: neither {self.home() / 'text.json'} nor {path} is there; {_RAW}")
            for number, row in enumerate(csv.reader(read_text_lines(path, f"{self.name} titles")), start=1):
                if len(row) < 3 or (number == 1 and not row[0].lower().endswith(_IMAGE_SUFFIX)):
                    if row and number > 1:
                        raise UserError(f"{path}, line {number}: expected file, title, class; mend the line")
                    continue
                texts[row[0]] = row[1]
        return texts


def _class_name(file: str) -> str:
    """The class in a file's name, up to the last ``_``."""
    return file.rpartition("_")[0]


def _class(file: str, index: dict[str, int]) -> int:
    name = _class_name(file)
    if name not in index:
        raise UserError(f"food101: {file} belongs to the class {name!r}, which class_idx.json does not have; {_RAW}")
    return index[name]


def _names(index: dict[str, int]) -> list[str]:
    return sorted(index, key=lambda name: index[name])
