"""How2Sign, OpenASL and alike: folders of clips and a table of English sentences; there are no questions."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from polymodal.data import read_text_lines, require_dir
from polymodal.errors import UserError

from slt.data.base import Item, SLTData
from slt.data.clips import clip_lengths, load_clip
from slt.data.video import VIDEO_SUFFIXES

if TYPE_CHECKING:
    import numpy as np

__all__ = ["How2Sign"]

_IDS = ("SENTENCE_NAME", "SENTENCE_ID", "vid", "video_id", "id", "name")
_TEXTS = ("SENTENCE", "raw-text", "sentence", "translation", "text")
_FOLDERS = {"train": ("train",), "dev": ("val", "dev"), "test": ("test",)}
_SPLIT_VALUES = {"train": ("train",), "dev": ("val", "valid", "dev"), "test": ("test",)}
_log = logging.getLogger(__name__)


@dataclass
class How2Sign(SLTData):
    """How2Sign or OpenASL: ``<root>/{train,val,test}/rgb/*.mp4`` and a table with id and sentence.

    The table of a split is the first of ``<root>/<split>/*.{tsv,csv}``, ``<root>/*<split>*.{tsv,csv}``, or one table
    in the root with a column ``split``. Tab, comma, semicolon and bar are recognised as separators. Clips may be frame
    folders instead of videos. Questions can be added as in the other data sets, e.g. template questions.
    """

    id_column: str = ""
    """column with the clip's name; empty: SENTENCE_NAME, SENTENCE_ID, vid, video_id, id or name"""
    text_column: str = ""
    """column with the sentence; empty: SENTENCE, raw-text, sentence, translation or text"""
    skip_missing: bool = False
    """leave out rows without a clip (their number is logged) instead of an error"""

    name: ClassVar[str] = "how2sign"
    language: ClassVar[str] = "en_XX"
    remedy: ClassVar[str] = "give the folder that holds train, val and test"

    def table(self, split: str) -> Path:
        """The annotation of a split.

        Raises:
            UserError: none found; says where it was looked for.
        """
        home = self.home()
        for name in _FOLDERS[split]:
            for folder, pattern in ((home / name, "*"), (home, f"*{name}*")):
                found = sorted(p for s in (".tsv", ".csv") for p in folder.glob(pattern + s))
                if found:
                    return found[0]
        shared = sorted(p for s in (".tsv", ".csv") for p in home.glob("*" + s))
        if shared:
            return shared[0]
        raise UserError(
            f"{self.name} {split}: no table; put a .tsv or .csv with id and sentence into {home / _FOLDERS[split][0]}"
        )

    def read_split(self, split: str) -> list[Item]:
        """Rows of the split's table, each with its clip."""
        path = self.table(split)
        rows = self._rows(path, split)
        folder = self._folder(split)
        clips = {name: _find(folder, name) for name, _ in rows}
        missing = [name for name, clip in clips.items() if clip is None]
        if missing and not self.skip_missing:
            raise UserError(
                f"{self.name} {split}: {folder / missing[0]}.mp4 is missing ({len(missing)} of {len(rows)} clips of "
                f"{path.name}); copy the clips, or leave those rows out with --data.skip_missing true"
            )
        if missing:
            _log.warning("%s %s: %d of %d rows have no clip, left out", self.name, split, len(missing), len(rows))
        paths = {name: clip for name, clip in clips.items() if clip is not None}
        counts = clip_lengths(f"{self.name} {split} {folder.resolve()}", paths)
        return [
            Item(name, text, num_frames=counts[name], source=(str(paths[name]),))
            for name, text in rows
            if name in paths
        ]

    def _rows(self, path: Path, split: str) -> list[tuple[str, str]]:
        lines = read_text_lines(path, f"{self.name} table")
        head = lines[0] if lines else ""
        delimiter = max("\t,;|", key=head.count)
        reader = csv.DictReader(
            lines, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        )
        columns = list(reader.fieldnames or [])
        name = _column(path, columns, self.id_column, _IDS, "id_column")
        text = _column(path, columns, self.text_column, _TEXTS, "text_column")
        out: list[tuple[str, str]] = []
        seen: dict[str, int] = {}
        for row in reader:
            line = reader.line_num
            if "split" in columns and row["split"] not in _SPLIT_VALUES[split]:
                continue
            if not row[name] or not (row[text] or "").strip():
                raise UserError(f"{path}:{line}: column {name} or {text} is empty; fill it in or remove the row")
            if row[name] in seen:
                raise UserError(f"{path}:{line}: {row[name]} was already given on line {seen[row[name]]}; keep one")
            seen[row[name]] = line
            out.append((row[name], row[text].strip()))
        if not out:
            raise UserError(f"{path}: no row for split {split}; copy the table again")
        return out

    def _folder(self, split: str) -> Path:
        home = self.home()
        inside = ("rgb", "rgb_front/raw_videos", "raw_videos", "")
        for name in _FOLDERS[split]:
            for part in inside:
                if (home / name / part).is_dir():
                    return home / name / part
        return require_dir(home / _FOLDERS[split][0] / "rgb", f"{self.name} clips", "copy the clips there")

    def load(self, item: Item, indices: Sequence[int]) -> np.ndarray:
        """Frames ``(T, H, W, 3)`` uint8 of one clip."""
        return load_clip(item.source[0], indices)


def _column(path: Path, columns: list[str], wanted: str, known: Sequence[str], option: str) -> str:
    choices = (wanted,) if wanted else known
    for choice in choices:
        if choice in columns:
            return choice
    raise UserError(
        f"{path}:1: no column {' or '.join(choices)} among {', '.join(columns) or 'nothing'}; "
        f"name it with --data.{option}"
    )


def _find(folder: Path, name: str) -> Path | None:
    if "/" in name or "\\" in name or name in (".", ".."):
        raise UserError(f"clip name {name!r} is not a file name; mend the table")
    for suffix in ("", *VIDEO_SUFFIXES):
        path = folder / (name + suffix)
        if path.is_file() if suffix else path.is_dir():
            return path
    return None
