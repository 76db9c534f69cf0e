"""A user's own data: JSONL rows with what each sample has, null where a modality is really missing. No torch (CLI)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from polymodal.errors import UserError, did_you_mean

from missing_modal.data.base import SPLITS, Sample, Task
from missing_modal.data.files import FileData, Listing, jsonl_rows

__all__ = ["KINDS", "SCHEMA", "SCHEMA_VERSION", "Manifest"]

KINDS = ("image", "text", "audio", "tabular")
"""names that need no header, in the order of the model"""
SCHEMA = "missing_modal.manifest"
SCHEMA_VERSION = 1
_HEADER_KEYS = ("schema", "schema_version", "modalities", "classes", "labels")
_REMEDY = "give a JSONL file, or a folder with train.jsonl, val.jsonl and test.jsonl"
_METRICS: dict[str, str] = {"multiclass": "accuracy", "multilabel": "f1_macro", "binary": "auroc"}


@dataclass
class _Header:
    """What the first line of a file may say."""

    modalities: dict[str, str] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    labels: str = ""


@dataclass
class Manifest(FileData):
    """Own data: ``{"id", "image"?, "text"?, "audio"?, "tabular"?, "label", "split"?, "row"?}`` a line.

    ``image`` and ``audio`` are paths from the file's folder, ``text`` is the text, ``tabular`` a list of numbers or the
    path of a .npy file; a key that is null or absent is really missing. ``label`` is a class (text or number), a list
    of classes (several labels), or null in data to predict. A folder has ``{train,val,test}.jsonl``; in one file
    ``split`` says where a row belongs, and without any ``split`` rows are dealt out by their ids.

    The first line may be a header: ``{"schema": "missing_modal.manifest", "schema_version": 1, "classes": [...],
    "modalities": {"front": "image", "side": "image", "text": "text"}, "labels": "binary"}``; it fixes the order of the
    classes, names modalities of any number and their kinds, and the kind of the labels.

    Args:
        root: the file or folder.
        labels: multiclass, binary (the second class is the positive one) or multilabel; auto: multilabel where labels
            are lists, else multiclass.
        val_share: share of rows for validation where no row has a split, 0..1.
        test_share: share of rows for testing where no row has a split, 0..1.
    """

    labels: Literal["auto", "multiclass", "multilabel", "binary"] = "auto"
    val_share: float = 0.1
    test_share: float = 0.2

    name: ClassVar[str] = "manifest"
    remedy: ClassVar[str] = _REMEDY

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.val_share, self.test_share) < 0 or self.val_share + self.test_share >= 1:
            raise UserError(
                f"data.val_share={self.val_share}, data.test_share={self.test_share}; expected shares of the rows, "
                "together below 1"
            )

    # ------------------------------------------------------------------ what the rows say

    @property
    def modalities(self) -> tuple[str, ...]:  # type: ignore[override]  # fixed in other readers, told by the rows here
        """Names in the order of the header; without it those of image, text, audio, tabular that some row has."""
        return tuple(self.kinds)

    @property
    def kinds(self) -> dict[str, str]:
        """How each modality is decoded."""
        return dict(self._read()[0].modalities)

    @property
    def task(self) -> Task:  # type: ignore[override]
        """Of the option, the header or the labels."""
        stated = self.labels if self.labels != "auto" else self._read()[0].labels
        if stated:
            return stated  # type: ignore[return-value]  # checked when the header is read
        found: Task | None = self.__dict__.get("_found_task")
        if found is None:  # asked for every row: a look at all rows each time would be quadratic
            rows = (row for split in self._read()[1].values() for _, row in split)
            found = "multilabel" if any(isinstance(row.get("label"), list) for row in rows) else "multiclass"
            self.__dict__["_found_task"] = found
        return found

    @property
    def metric(self) -> str:  # type: ignore[override]
        """F1-macro for several labels, AUROC for two classes, else accuracy."""
        return _METRICS[self.task]

    def class_names(self) -> list[str]:
        """Names of the header; without them the labels of all rows, numbers by value, texts by letters.

        Raises:
            UserError: a list of labels in one row and a single one in another, or fewer than two classes.
        """
        known: list[str] | None = self.__dict__.get("_names")
        if known is None:
            header, splits = self._read()
            known = header.classes or _found_classes([row for rows in splits.values() for _, row in rows])
            least = 1 if self.task == "multilabel" else 2
            if len(known) < least or (self.task == "binary" and len(known) != 2):
                wanted = "exactly 2" if self.task == "binary" else f"at least {least}"
                raise UserError(
                    f"{self.name}: {self.root} has {len(known)} classes ({', '.join(known[:5])}); expected {wanted}: "
                    "label more rows, or list the classes in a header"
                )
            self.__dict__["_names"] = known
        return list(known)

    # ------------------------------------------------------------------ reading

    def home(self) -> Path:
        """The folder that paths in the rows start from."""
        if self.root is None:
            raise UserError(f"{self.name}: no file given; {self.remedy} (--data.root FILE)")
        return self.root if self.root.is_dir() else self.root.parent

    def read_split(self, split: str) -> list[Sample]:
        """Samples of a split in file order."""
        header, splits = self._read()
        number = {name: place for place, name in enumerate(self.class_names())}
        listing = Listing(self.name, "correct the path in the row, or make it null where the modality is missing")
        samples = []
        for where, row in splits[split]:
            inputs = {
                name: self._input(kind, row.get(name), f"{where}: {name}", listing)
                for name, kind in header.modalities.items()
            }
            label = self._label(row.get("label"), number, where)
            if label is None and split == "train":
                raise UserError(f"{where}: no label; rows for training need one")
            samples.append(Sample(row["id"], inputs, label, row=str(row.get("row") or "")))
        return samples

    def _input(self, kind: str, value: Any, where: str, listing: Listing) -> Any:
        if value is None:
            return None
        if kind == "tabular" and isinstance(value, list):
            if not value or not all(isinstance(one, int | float) for one in value):
                raise UserError(
                    f"{where}: expected a list of numbers, found {str(value)[:60]}; fill gaps in, or make it null"
                )
            return value
        if not isinstance(value, str):
            wanted = "a text" if kind == "text" else "a path"
            raise UserError(f"{where}: expected {wanted} or null, found {str(value)[:60]}")
        if kind == "text":
            return value
        if not value:
            raise UserError(f"{where} is empty; write null where the modality is missing")
        try:
            return listing.need(self.home() / value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def _label(self, value: Any, number: Mapping[str, int], where: str) -> int | tuple[int, ...] | None:
        if value is None:
            return None
        several = self.task == "multilabel"
        if isinstance(value, list) != several:
            raise UserError(f"{where}: label {value!r}; expected {'a list of classes' if several else 'one class'}")
        for one in value if several else [value]:
            if str(one) not in number:
                near = did_you_mean(str(one), number)
                raise UserError(f"{where}: unknown class {one!r}; {near}known: {', '.join(list(number)[:12])}")
        if several:
            given = {number[str(one)] for one in value}
            return tuple(int(place in given) for place in range(len(number)))
        return number[str(value)]

    def _read(self) -> tuple[_Header, dict[str, list[tuple[str, dict[str, Any]]]]]:
        """Header and rows by split, each with its place; read once."""
        known = self.__dict__.get("_rows")
        if known is None:
            home = self.home()  # names the option where there is no root
            if self.root is not None and self.root.is_dir():
                known = self._read_folder(home)
            else:
                known = self._read_file(Path(str(self.root)))
            header, splits = known
            if not header.modalities:
                rows = [row for found in splits.values() for _, row in found]
                header.modalities = {name: name for name in KINDS if any(row.get(name) is not None for row in rows)}
            if not header.modalities:
                raise UserError(f"{self.name}: {self.root}: no row has one of {', '.join(KINDS)}")
            self.__dict__["_rows"] = known
        return known  # type: ignore[no-any-return]

    def _read_folder(self, folder: Path) -> tuple[_Header, dict[str, list[tuple[str, dict[str, Any]]]]]:
        header, splits = _Header(), dict[str, list[tuple[str, dict[str, Any]]]]()
        for split in SPLITS:
            path = folder / f"{split}.jsonl"
            if split == "val" and not path.is_file():
                splits[split] = []
                continue
            first, rows = _rows(path)
            if first.modalities or first.classes or first.labels:
                if (header.modalities or header.classes or header.labels) and first != header:
                    raise UserError(f"{path}:1: another header than in train.jsonl; make them alike")
                header = first
            splits[split] = [(where, row) for _, where, row in rows]
        return header, splits

    def _read_file(self, path: Path) -> tuple[_Header, dict[str, list[tuple[str, dict[str, Any]]]]]:
        header, rows = _rows(path)
        splits: dict[str, list[tuple[str, dict[str, Any]]]] = {split: [] for split in SPLITS}
        stated = [row for _, _, row in rows if row.get("split") is not None]
        for _, where, row in rows:
            split = row.get("split") if stated else self._dealt(str(row.get("row") or row["id"]))
            if split not in SPLITS:
                raise UserError(
                    f"{where}: split {split!r}; expected one of {', '.join(SPLITS)} in each row, or in no row"
                )
            splits[split].append((where, row))
        return header, splits

    def _dealt(self, row: str) -> str:
        """Split of a row by its id: the same whatever other rows there are."""
        place = zlib.crc32(row.encode()) / 2**32
        if place < self.test_share:
            return "test"
        return "val" if place < self.test_share + self.val_share else "train"


def _rows(path: Path) -> tuple[_Header, list[tuple[int, str, dict[str, Any]]]]:
    """Header and checked rows of a file."""
    header, rows = _Header(), list[tuple[int, str, dict[str, Any]]]()
    lines: dict[str, int] = {}
    for number, row in jsonl_rows(path, "manifest", _REMEDY):
        where = f"{path}:{number}"
        if "schema" in row and not rows:
            header = _header(row, where)
            continue
        allowed = ("id", "label", "split", "row", *(header.modalities or KINDS))
        for key in row:
            if key not in allowed:
                raise UserError(
                    f"{where}: unknown key {key!r}; {did_you_mean(key, allowed)}allowed: {', '.join(allowed)} "
                    "(a header names other modalities)"
                )
        name = row.get("id")
        if not isinstance(name, str | int) or name == "":
            raise UserError(f"{where}: id {name!r}; expected a text or a number that no other row has")
        row["id"] = str(name)
        if row["id"] in lines:
            raise UserError(f"{where}: id {row['id']!r} is also that of line {lines[row['id']]}; ids must differ")
        lines[row["id"]] = number
        rows.append((number, where, row))
    if not rows:
        raise UserError(f"{path}: no rows; write one object a line with id, label and {', '.join(KINDS)}")
    return header, rows


def _header(row: dict[str, Any], where: str) -> _Header:
    version = row.get("schema_version")
    if row["schema"] != SCHEMA or not isinstance(version, int) or version < 1:
        raise UserError(f"{where}: header {str(row)[:80]}; expected schema {SCHEMA!r}, schema_version {SCHEMA_VERSION}")
    if version > SCHEMA_VERSION:
        raise UserError(f"{where}: schema_version {version} is newer than {SCHEMA_VERSION}; update missing_modal")
    for key in row:
        if key not in _HEADER_KEYS:
            raise UserError(f"{where}: unknown key {key!r} in the header; allowed: {', '.join(_HEADER_KEYS)}")
    kinds, classes, labels = row.get("modalities") or {}, row.get("classes") or [], row.get("labels") or ""
    if not isinstance(kinds, dict) or any(kind not in KINDS for kind in kinds.values()):
        raise UserError(f"{where}: modalities {str(kinds)[:80]}; expected names with one of {', '.join(KINDS)} each")
    if not isinstance(classes, list) or len({str(one) for one in classes}) < len(classes):
        raise UserError(f"{where}: classes {str(classes)[:80]}; expected a list of distinct names")
    if labels and labels not in _METRICS:
        raise UserError(f"{where}: labels {labels!r}; expected one of {', '.join(_METRICS)}")
    return _Header(dict(kinds), [str(one) for one in classes], str(labels))


def _found_classes(rows: list[dict[str, Any]]) -> list[str]:
    """Distinct labels: numbers by value, else texts by letters."""
    found: set[Any] = set()
    for row in rows:
        label = row.get("label")
        found.update(label if isinstance(label, list) else [] if label is None else [label])
    if all(isinstance(one, int) for one in found):
        return [str(one) for one in sorted(found)]
    return sorted(str(one) for one in found)
