"""RWTH-PHOENIX-Weather 2014T in its official layout: frame folders and ``|``-separated annotation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from polymodal.data import drop_index, indexed
from polymodal.errors import UserError
from polymodal.paths import read_text_lines, require_dir, require_files

from slt.data.base import Item, SLTData
from slt.data.frames import count_frames, frame_names, load_frames

__all__ = ["Phoenix2014T"]

_COLUMNS = ("name", "video", "start", "end", "speaker", "orth", "translation")
_NEEDED = ("name", "translation")


@dataclass
class Phoenix2014T(SLTData):
    """PHOENIX-2014T: German weather forecasts, 7096/519/642 clips.

    ``<root>/[PHOENIX-2014-T/]features/fullFrame-210x260px/{train,dev,test}/<video>/[1/]images0001.png ...`` and
    ``annotations/manual/PHOENIX-2014-T.{train,dev,test}.corpus.csv`` with the columns
    ``name|video|start|end|speaker|orth|translation``, with or without a header; a header may have them in any order.
    Further options are those of :class:`~slt.data.base.SLTData`; texts are lower-cased unless told otherwise.

    Args:
        root: ``PHOENIX-2014-T``, or a folder that holds it (one or two levels up).
        questions: folder with ``{train,dev,test}.jsonl``; default: a folder ``questions`` in ``root`` or beside the
            annotations, where there is one.
    """

    lowercase: bool = True

    name: ClassVar[str] = "phoenix2014t"
    remedy: ClassVar[str] = "give the folder PHOENIX-2014-T of the official archive, or the folder that holds it"
    features: ClassVar[str] = "features/fullFrame-210x260px"

    def home(self) -> Path:
        """The folder with ``annotations`` and ``features``.

        Raises:
            UserError: no root given, or the first missing file.
        """
        root = super().home()
        inside = ("", "PHOENIX-2014-T", "PHOENIX-2014-T-release-v3/PHOENIX-2014-T")
        for candidate in (root / part for part in inside):
            if (candidate / "annotations" / "manual").is_dir():
                return candidate
        home = root if root.name == "PHOENIX-2014-T" else root / "PHOENIX-2014-T"
        require_files(home, [self.annotation("train")], self.name, self.remedy)
        return home  # pragma: no cover - the line above raises unless the folder appeared this instant

    @staticmethod
    def annotation(split: str) -> str:
        """Path of a split's csv below :meth:`home`."""
        return f"annotations/manual/PHOENIX-2014-T.{split}.corpus.csv"

    def read_split(self, split: str) -> list[Item]:
        """Rows of the split's csv, each with its frame folder and frame count."""
        home = self.home()
        (path,) = require_files(home, [self.annotation(split)], self.name, self.remedy)
        rows = self._rows(path)
        folder = require_dir(home / self.features / split, f"{self.name} frames", "unpack the features of the archive")
        counts = indexed(_identity(folder), _state(folder), lambda: _scan(folder))
        items = []
        for line, row in rows:
            name = row["name"]
            level, frames = counts.get(name) or ("", 0)
            if not frames:  # not cached as empty: the folder's own time stamp does not tell when it is filled
                level, frames = _look(folder / name)
            if not frames:
                raise UserError(
                    f"{self.name} {split}: {folder / name / 'images0001.png'} is missing"
                    f" ({path.name}, line {line}); unpack this clip again or remove the line"
                )
            source = (str(folder / name / level if level else folder / name),)
            items.append(
                Item(name, row["translation"], num_frames=frames, source=source, speaker=row.get("speaker", ""))
            )
        return items

    def _rows(self, path: Path) -> list[tuple[int, dict[str, str]]]:
        lines = read_text_lines(path, f"{self.name} annotation")
        first = [cell.strip() for cell in lines[0].split("|")] if lines else []
        header = set(_NEEDED) <= set(first)
        columns: Sequence[str] = first if header else _COLUMNS
        rows = []
        for number, text in enumerate(lines[header:], start=1 + header):
            if not text.strip():
                continue
            cells = [cell.strip() for cell in text.split("|")]
            if len(cells) != len(columns):
                raise UserError(
                    f"{self.name} annotation: {path}, line {number}: {len(cells)} fields, expected {len(columns)}"
                    f" ({'|'.join(columns)}); mend the line"
                )
            row = dict(zip(columns, cells, strict=True))
            for needed in _NEEDED:
                if not row[needed]:
                    what = "sentence" if needed == "translation" else needed
                    raise UserError(
                        f"{self.name} annotation: {path}, line {number}: the {what} is empty;"
                        " fill it in or remove the line"
                    )
            if "/" in row["name"] or "\\" in row["name"] or row["name"] in {".", ".."}:
                raise UserError(
                    f"{self.name} annotation: {path}, line {number}: name {row['name']!r} is no folder name; mend it"
                )
            rows.append((number, row))
        if not rows:
            raise UserError(f"{self.name} annotation: {path} has no rows; copy it again from the archive")
        return rows

    def load(self, item: Item, indices: Sequence[int]) -> np.ndarray:
        """Frames ``(T, H, W, 3)`` uint8 of one clip."""
        names = frame_names(item.source[0])
        if len(names) != item.num_frames:
            drop_index(_identity(Path(item.source[0]).parent))
            drop_index(_identity(Path(item.source[0]).parent.parent))  # clip folders with the extra level "1/"
            raise UserError(
                f"clip {item.source[0]} has {len(names)} frames, {item.num_frames} when it was indexed; the index was"
                " dropped: copy the clip again if it is incomplete, then start again"
            )
        return load_frames(item.source[0], indices, names)


def _identity(folder: Path) -> str:
    return f"frames {folder.resolve()}"


def _state(folder: Path) -> list[int]:
    return [folder.stat().st_mtime_ns, len(os.listdir(folder))]  # noqa: PTH208 (only counted)


def _look(clip: Path) -> tuple[str, int]:
    """Sub-folder with the frames ("" or "1") and how many there are."""
    frames = count_frames(clip)
    return ("", frames) if frames else ("1", count_frames(clip / "1"))


def _scan(folder: Path) -> dict[str, tuple[str, int]]:
    return {entry.name: _look(Path(entry.path)) for entry in sorted(os.scandir(folder), key=lambda e: e.name)}
