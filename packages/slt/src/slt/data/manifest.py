"""A user's own data: one JSONL per split that names the clips, wherever they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from polymodal.errors import UserError

from slt.data.base import Item, SLTData
from slt.data.clips import clip_length, clip_lengths, load_clip
from slt.data.jsonl import Migration, looks_misdecoded, read_rows
from slt.data.video import VIDEO_SUFFIXES, is_video

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DATASET_FILE", "DATASET_SCHEMA", "DATASET_VERSION", "SCHEMA", "SCHEMA_VERSION", "Manifest"]

DATASET_FILE = "dataset.json"
DATASET_SCHEMA = "slt.dataset"
DATASET_VERSION = 1
SCHEMA = "slt.manifest"
SCHEMA_VERSION = 1
MIGRATIONS: dict[int, Migration] = {}

_REQUIRED = ("video_id", "video", "sentence")
_OPTIONAL = ("question", "speaker", "topic")


@dataclass
class Manifest(SLTData):
    """Own data: ``<root>/{train,dev,test}.jsonl`` with ``{"video_id", "video", "sentence", "question"?}`` a line.

    ``video`` is a folder of pictures or a video file, relative to the JSONL file or absolute. Optional keys:
    ``question``, ``speaker``, ``topic``; a folder ``questions`` takes precedence over the key. The first line may be
    ``{"schema": "slt.manifest", "schema_version": 1}``, and a file ``dataset.json`` with ``{"schema": "slt.dataset",
    "schema_version": 1, "language": "de_DE", "level": "word"}`` saves the options of that name.
    """

    language: str = ""  # type: ignore[misc]  # an option here, fixed in the other readers
    """language tag such as en_XX, de_DE, zh_CN; empty: from <root>/dataset.json, else en_XX"""
    level: str = ""  # type: ignore[misc]
    """unit of scores and masking, word or char; empty: from <root>/dataset.json, else word"""

    name: ClassVar[str] = "manifest"
    remedy: ClassVar[str] = "give the folder that holds train.jsonl, dev.jsonl and test.jsonl"

    def __post_init__(self) -> None:
        super().__post_init__()
        stated = _dataset_file(self.root)
        self.language = self.language or str(stated.get("language", "en_XX"))
        self.level = self.level or str(stated.get("level", "word"))
        if self.level not in ("word", "char"):
            raise UserError(f"level={self.level!r}; expected word (blank-separated) or char (e.g. Chinese)")

    def file(self, split: str) -> Path:
        """The JSONL file of a split.

        Raises:
            UserError: no root, or the file is missing.
        """
        path = self.home() / f"{split}.jsonl"
        if not path.is_file():
            raise UserError(f"{self.name}: {path} is missing; {self.remedy}")
        return path

    def read_split(self, split: str) -> list[Item]:
        """Rows of the split's file, each with its clip."""
        path = self.file(split)
        items: dict[str, Item] = {}
        lines: dict[str, int] = {}
        for number, row in read_rows(path, SCHEMA, SCHEMA_VERSION, MIGRATIONS, option="--data.root"):
            item = self._item(path, number, row)
            if item.id in items:
                raise UserError(f"{path}:{number}: video_id {item.id!r} was already given on line {lines[item.id]}")
            items[item.id], lines[item.id] = item, number
        if not items:
            raise UserError(f"{path}: no rows; write one object a line with {', '.join(_REQUIRED)}")
        counts = self._counts(path, split, items, lines)
        return [replace(item, num_frames=counts[name]) for name, item in items.items()]

    def _item(self, path: Path, number: int, row: dict[str, Any]) -> Item:
        for key in _REQUIRED:
            if key not in row:
                raise UserError(f"{path}:{number}: key {key!r} is missing; a row needs {', '.join(_REQUIRED)}")
        for key, value in row.items():
            if key not in _REQUIRED + _OPTIONAL:
                raise UserError(f"{path}:{number}: unknown key {key!r}; allowed are {', '.join(_REQUIRED + _OPTIONAL)}")
            if key != "video" and not isinstance(value, str):
                raise UserError(f"{path}:{number}: {key} must be text, got {value!r}")
            if isinstance(value, str) and looks_misdecoded(value):
                raise UserError(f"{path}:{number}: {key} looks wrongly decoded (mixed encodings); write it in UTF-8")
        if not row["video_id"].strip() or not row["sentence"].strip():
            raise UserError(f"{path}:{number}: video_id or sentence is empty; fill it in or remove the row")
        return Item(
            row["video_id"],
            row["sentence"],
            question=row.get("question", ""),
            source=self._source(path, number, row["video"]),
            speaker=row.get("speaker", ""),
            topic=row.get("topic", ""),
        )

    def _source(self, path: Path, number: int, video: Any) -> tuple[str, ...]:
        if not isinstance(video, str) or not video:
            raise UserError(f"{path}:{number}: video must be a path, got {video!r}")
        clip = path.parent / video
        if not clip.exists():
            raise UserError(f"{path}:{number}: {clip} does not exist; paths are relative to {path.parent}")
        if clip.is_file() and not is_video(clip):
            hint = "; for .pose files use --data poses" if clip.suffix == ".pose" else ""
            raise UserError(f"{path}:{number}: {clip} is neither a folder nor one of {', '.join(VIDEO_SUFFIXES)}{hint}")
        return (str(clip),)

    def _counts(self, path: Path, split: str, items: dict[str, Item], lines: dict[str, int]) -> dict[str, int]:
        files = {source: Path(source) for item in items.values() for source in item.source}
        counts = clip_lengths(f"{self.name} {split} {path.resolve()}", files, self.clip_length)
        return {name: sum(counts[source] for source in item.source) for name, item in items.items()}

    def _read_questions(self, split: str, sentences: dict[str, str]) -> dict[str, Any]:
        """Questions of the folder, where there is one; else those of the rows stay."""
        return super()._read_questions(split, sentences) if self.questions_dir() is not None else {}

    @staticmethod
    def clip_length(path: Path) -> int:
        """Frames of one clip."""
        return clip_length(path)

    def load(self, item: Item, indices: Sequence[int]) -> np.ndarray:
        """Frames ``(T, H, W, 3)`` uint8 of one clip."""
        return load_clip(item.source[0], indices)


def _dataset_file(root: Path | None) -> dict[str, Any]:
    """What ``<root>/dataset.json`` says; nothing where there is none."""
    path = root / DATASET_FILE if root is not None else None
    if path is None or not path.is_file():
        return {}
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        schema, version = stated["schema"], stated["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a dataset file ({error!r}); correct or remove it") from error
    if schema != DATASET_SCHEMA or version != DATASET_VERSION:
        raise UserError(
            f"{path}: {schema!r} version {version} cannot be read, known is {DATASET_SCHEMA!r} version "
            f"{DATASET_VERSION}; correct the file or update polymodal-slt"
        )
    result: dict[str, Any] = stated
    return result
