"""CSL-Daily in its official layout: frame folders or cropped videos, a pickled annotation and a split file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from polymodal.data import read_text_lines, require_files, safe_unpickle
from polymodal.errors import UserError

from slt.data.base import SPLITS, Item, SLTData
from slt.data.clips import clip_lengths, load_clip

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CSLDaily"]

_LABELS = "sentence_label/csl2020ct_v2.pkl"
_SPLIT_FILES = ("sentence_label/split_1.txt", "sentence_label/video_split_1.txt")
_FRAMES, _CROPS = "sentence/frames_512x512", "sentence-crop"
_log = logging.getLogger(__name__)


@dataclass
class CSLDaily(SLTData):
    """CSL-Daily: Chinese daily-life sentences, several signers a sentence; 18401/1077/1176 clips.

    ``<root>/sentence/frames_512x512/<name>/*.jpg`` (else ``<root>/[sentence/]sentence-crop/<name>.mp4``),
    ``sentence_label/csl2020ct_v2.pkl`` and ``sentence_label/split_1.txt`` (else ``video_split_1.txt``). The pickle is
    read without running anything in it. Sentences are ``label_char`` joined without blanks; scores are per character.
    Ids that stand in only one of pickle and split file are left out and named in a warning.
    """

    name: ClassVar[str] = "csl_daily"
    language: ClassVar[str] = "zh_CN"
    level: ClassVar[str] = "char"
    remedy: ClassVar[str] = "give the folder that holds sentence_label and sentence (or sentence-crop) as released"

    def home(self) -> Path:
        """The folder with ``sentence_label``.

        Raises:
            UserError: no root given, or the first missing file.
        """
        root = super().home()
        for candidate in (root, root / "csl-daily", root / "CSL-Daily"):
            if (candidate / "sentence_label").is_dir():
                return candidate
        require_files(root, [_LABELS], self.name, self.remedy)
        return root  # pragma: no cover - the line above raises unless the folder appeared this instant

    def read_split(self, split: str) -> list[Item]:
        """Clips of the split that pickle and split file agree on, in the order of the split file."""
        joined: dict[str, list[Item]] = self.__dict__.setdefault("_joined", {})
        if not joined:
            joined.update(self._join())
        found = joined[split]
        if not found:
            raise UserError(f"{self.name}: split {split} is empty after joining pickle and split file; copy both again")
        paths = self._clips([item.id for item in found])
        counts = clip_lengths(f"{self.name} {split} {self.home().resolve()}", paths)
        return [replace(item, num_frames=counts[item.id], source=(str(paths[item.id]),)) for item in found]

    def _join(self) -> dict[str, list[Item]]:
        home = self.home()
        labels = self._labels(home / _LABELS)
        path = next((home / name for name in _SPLIT_FILES if (home / name).is_file()), home / _SPLIT_FILES[0])
        assigned = self._assignment(path)
        for have, other, text in (
            (assigned, labels, f"in {path.name} but not in {Path(_LABELS).name}"),
            (labels, assigned, f"in {Path(_LABELS).name} but not in {path.name}"),
        ):
            odd = [name for name in have if name not in other]
            if odd:
                shown = ", ".join(odd[:10]) + (", ..." if len(odd) > 10 else "")
                _log.warning("%s: %d clips are %s and are left out: %s", self.name, len(odd), text, shown)
        out: dict[str, list[Item]] = {split: [] for split in SPLITS}
        for name, split in assigned.items():
            if name in labels:
                out[split].append(labels[name])
        if not any(out.values()):
            raise UserError(f"{self.name}: {path} and {home / _LABELS} share no id; are both of the same release?")
        return out

    def _labels(self, path: Path) -> dict[str, Item]:
        data = safe_unpickle(path, f"{self.name} annotation")
        rows = data.get("info") if isinstance(data, dict) else None
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a dict with a list `info`; is it csl2020ct_v2.pkl?")
        out: dict[str, Item] = {}
        for number, row in enumerate(rows):
            item = _label(path, number, row)
            known = out.setdefault(item.id, item)
            if known.sentence != item.sentence:
                raise UserError(f"{path}: info[{number}]: {item.id} has two different sentences; download it again")
        return out

    def _assignment(self, path: Path) -> dict[str, str]:
        out: dict[str, str] = {}
        for number, line in enumerate(read_text_lines(path, f"{self.name} split file"), 1):
            cells = [cell.strip() for cell in line.split("|")]
            if not line.strip() or (number == 1 and cells[:2] == ["name", "split"]):
                continue
            if len(cells) != 2 or not cells[0] or cells[1] not in SPLITS:
                raise UserError(
                    f"{path}:{number}: expected `name|split` (train, dev or test), got {line[:60]!r}; mend the line"
                )
            if out.setdefault(cells[0], cells[1]) != cells[1]:
                raise UserError(
                    f"{path}:{number}: {cells[0]} is in {out[cells[0]]} and {cells[1]}; keep one of the rows"
                )
        return out

    def _clips(self, names: list[str]) -> dict[str, Path]:
        home = self.home()
        if (home / _FRAMES).is_dir():
            return {name: home / _FRAMES / name for name in names}
        for crops in (home / _CROPS, home / "sentence" / _CROPS):
            if crops.is_dir():
                return {name: crops / f"{name}.mp4" for name in names}
        raise UserError(f"{self.name}: neither {home / _FRAMES} nor {home / _CROPS} exists; unpack the frames or crops")

    def load(self, item: Item, indices: Sequence[int]) -> np.ndarray:
        """Frames ``(T, H, W, 3)`` uint8 of one clip."""
        return load_clip(item.source[0], indices)


def _label(path: Path, number: int, row: Any) -> Item:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str) or "label_char" not in row:
        raise UserError(f"{path}: info[{number}] has no `name` or `label_char`; is it csl2020ct_v2.pkl?")
    name, chars = row["name"], row["label_char"]
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        raise UserError(f"{path}: info[{number}]: name {name!r} is not a file name")
    sentence = "".join("".join(map(str, chars)).split())
    if not sentence:
        raise UserError(f"{path}: info[{number}]: the sentence of {name} is empty; fill it in or remove the clip")
    return Item(name, sentence, speaker=str(row.get("signer", "")))
