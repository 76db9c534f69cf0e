"""Hateful Memes: a picture with its words, hateful or not. No torch: it is part of the CLI."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from polymodal.errors import UserError
from polymodal.paths import require_dir

from missing_modal.data.arrow import ArrowCell, columns
from missing_modal.data.base import Sample, Task
from missing_modal.data.files import Listing, jsonl_rows
from missing_modal.data.images import read_bytes
from missing_modal.data.published import Published

__all__ = ["HatefulMemes"]

_RAW = "unpack Hateful Memes so that train.jsonl, dev.jsonl, test_seen.jsonl and img/ lie in one folder"


@dataclass
class HatefulMemes(Published):
    """Hateful Memes, raw or as ``hatememes_{train,dev,test}.arrow``.

    Raw: ``{train,dev,test}.jsonl`` (id, img, label, text) and ``img/``, in the root or in ``data`` below it. Testing is
    on ``test_seen.jsonl``, which the official code wants renamed to ``test.jsonl``: it is taken under either name. The
    ``test.jsonl`` of the competition has no labels and is refused. ``dev_seen.jsonl`` is taken where there is no
    ``dev.jsonl``.

    Args:
        root: the folder.
        layout: auto takes the Arrow files where the root holds some.
        tested: raw folders: test on test_seen (1,000, as published) or on test_unseen (2,000).
    """

    tested: Literal["seen", "unseen"] = "seen"

    name: ClassVar[str] = "hatememes"
    task: ClassVar[Task] = "binary"
    metric: ClassVar[str] = "auroc"
    remedy: ClassVar[str] = "give the folder with train.jsonl and img, or with hatememes_train.arrow"
    counts: ClassVar[dict[str, int]] = {"train": 8500, "val": 500, "test": 1000}

    def class_names(self) -> list[str]:
        """Two outputs."""
        return ["not hateful", "hateful"]

    def raw_home(self) -> Path:
        """The folder with the lists: the root, or ``data`` in it."""
        home = self.home()
        return home if (home / "train.jsonl").is_file() or not (home / "data").is_dir() else home / "data"

    def list_file(self, split: str) -> Path:
        """The list of a split.

        Raises:
            UserError: no such file; names the one that is missing.
        """
        home = self.raw_home()
        if split == "test" and self.tested == "unseen":
            names = ["test_unseen.jsonl"]
        else:
            names = {"test": ["test_seen.jsonl", "test.jsonl"], "val": ["dev.jsonl", "dev_seen.jsonl"]}.get(
                split, [f"{split}.jsonl"]
            )
        for name in names:
            if (home / name).is_file():
                return home / name
        raise UserError(f"{self.name}: {home / names[0]} is missing; {_RAW}")

    def read_raw(self, split: str) -> list[Sample]:
        """Samples of the split's list, in its order."""
        found = Listing(f"{self.name} {split}", _RAW)
        return [
            Sample(row["id"], {"image": found.need(row["image"]), "text": row["text"]}, row["label"])
            for row in self._rows(split)
        ]

    def read_arrow(self, split: str) -> list[Sample]:
        """Samples of the split's Arrow file; the official files have no ids, so that rows are numbered."""
        if self.tested != "seen":
            raise UserError(f"{self.name}: Arrow files hold one test split; data.tested=unseen needs the raw folder")
        path = self.arrow_file(split)
        held = columns(path, ("image", "text", "label"), ("image_id",))
        names = held.get("image_id") or [f"{self.official(split)}-{number:05d}" for number in range(len(held["label"]))]
        samples = []
        for number, (name, texts, label) in enumerate(zip(names, held["text"], held["label"], strict=True)):
            if label not in (0, 1):
                raise UserError(f"{path}, row {number}: label {label!r}; expected 0 or 1 (use test_seen.jsonl)")
            text = texts[0] if texts else None
            samples.append(Sample(str(name), {"image": ArrowCell(path, number), "text": text}, int(label)))
        return samples

    def arrow_rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Rows with the official columns image, text, label, split, and image_id, by which ids survive."""
        found = Listing(f"{self.name} {split}", _RAW)
        for row in self._rows(split):
            yield {
                "image": read_bytes(found.need(row["image"])),
                "text": [row["text"]],
                "label": row["label"],
                "split": self.official(split),
                "image_id": row["id"],
            }

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Rows of a list: id, image, text, label."""
        path = self.list_file(split)
        require_dir(path.parent / "img", f"{self.name} pictures", _RAW)
        for number, row in jsonl_rows(path, self.name, _RAW):
            where = f"{path}:{number}"
            for key in ("id", "img", "text"):
                if key not in row or not isinstance(row[key], str | int):
                    raise UserError(f"{where}: no {key!r}; expected id, img, label and text; {_RAW}")
            if row.get("label") not in (0, 1) or isinstance(row["label"], bool):
                hint = "the competition's test.jsonl has no labels: use test_seen.jsonl" if split == "test" else _RAW
                raise UserError(f"{where}: label {row.get('label')!r}; expected 0 or 1; {hint}")
            yield {
                # Lists of later releases write 5 digits, older ones drop leading zeros: the number is the id.
                "id": str(row["id"]).zfill(5),
                "image": path.parent / str(row["img"]),
                "text": str(row["text"]),
                "label": int(row["label"]),
            }
