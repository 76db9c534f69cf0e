"""What every reader shares: the item, text options, questions, fingerprint. Imports no torch: it is part of the CLI."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from polymodal.errors import UserError
from polymodal.paths import require_dir

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SPLITS", "Item", "SLTData", "collapse"]

SPLITS = ("train", "dev", "test")
_log = logging.getLogger(__name__)


def collapse(text: str) -> str:
    """``text`` with runs of white space made one blank and none at the ends."""
    return " ".join(text.split())


@dataclass(frozen=True)
class Item:
    """One clip with its texts.

    Args:
        id: name of the video, unique over all splits.
        sentence: spoken-language sentence, the target.
        question: the question that the signer answers; empty where there is none.
        num_frames: frames of the clip.
        source: where the frames are (a folder, a file, or several); meaning belongs to the reader.
        speaker: signer, where known.
        topic: topic of the question, where known; never an input of a model.
        signs: ground truth of the synthetic world; never an input of a model.
    """

    id: str
    sentence: str
    question: str = ""
    num_frames: int = 0
    source: tuple[str, ...] = ()
    speaker: str = ""
    topic: str = ""
    signs: tuple[str, ...] = ()


@dataclass
class SLTData:
    """Base class of the readers; a subclass fills in :meth:`read_split` and :meth:`load`.

    Args:
        root: folder of the data set in its official layout.
        questions: folder with ``{train,dev,test}.jsonl``; default ``<root>/questions`` where that exists, else no
            questions.
        allow_missing: give an empty question to videos that the question file does not have, instead of an error.
        lowercase: lower-case sentences and questions.
        append_period: append " ." to every sentence, as some prior work does; it shifts BLEU and is logged with it.
    """

    root: Path | None = None
    questions: Path | None = None
    allow_missing: bool = False
    lowercase: bool = False
    append_period: bool = False

    name: ClassVar[str] = ""
    language: ClassVar[str] = "de_DE"
    level: ClassVar[str] = "word"
    modality: ClassVar[str] = "frames"
    remedy: ClassVar[str] = "give the folder of the data set"
    """what to do where the root is missing, for messages"""

    def __post_init__(self) -> None:
        if self.root is not None:
            self.root = Path(self.root).expanduser()  # text is fine from Python code
        if self.questions is not None:
            self.questions = Path(self.questions).expanduser()

    # --- what a subclass fills in -------------------------------------------------------------------------------

    def read_split(self, split: str) -> list[Item]:
        """Items of one split without questions, in file order; texts as the annotation has them."""
        raise NotImplementedError(f"{type(self).__name__}.read_split")

    def load(self, item: Item, indices: Sequence[int]) -> np.ndarray:
        """Decode some frames of a clip.

        Args:
            item: one of :meth:`items`.
            indices: frame numbers from 0, sorted.

        Returns:
            ``(T, H, W, 3)`` uint8 for frames; ``(T, P, 4)`` float32 (x, y, z or 0, valid) for poses.

        Raises:
            UserError: a missing or broken file, by name.
        """
        raise NotImplementedError(f"{type(self).__name__}.load")

    def prepare(self) -> None:
        """Make what must exist before reading (the synthetic world is written here); nothing for most readers."""

    @property
    def landmarks(self) -> int:
        """Landmarks a frame; 0 where the modality is not ``pose``."""
        return 0

    def home(self) -> Path:
        """The folder that has the official layout: the root, or where a subclass finds it inside the root.

        Raises:
            UserError: no root given, or it is no folder.
        """
        if self.root is None:
            raise UserError(f"{self.name}: no root folder; {self.remedy} (--data.root DIR)")
        return require_dir(self.root, f"{self.name} root", self.remedy)

    # --- shared behaviour ---------------------------------------------------------------------------------------

    def items(self, split: str) -> list[Item]:
        """Items of a split with questions and text options applied.

        Args:
            split: ``train``, ``dev`` or ``test``.

        Raises:
            UserError: unknown split, bad files, an empty sentence, an id that occurs twice.
        """
        if split not in SPLITS:
            raise UserError(f"split {split!r}; expected one of {', '.join(SPLITS)}")
        known: dict[str, list[Item]] = self.__dict__.setdefault("_items", {})
        if split not in known:
            self.prepare()
            items = self.read_split(split)
            seen: set[str] = set()
            for item in items:
                if item.id in seen:
                    raise UserError(f"{self.name} {split}: video {item.id} occurs twice; remove one of the two rows")
                seen.add(item.id)
                if not item.sentence.strip():
                    raise UserError(
                        f"{self.name} {split}: video {item.id} has an empty sentence; remove it or fill it in"
                    )
            known[split] = self._finish(split, items)
        return known[split]

    def _finish(self, split: str, items: list[Item]) -> list[Item]:
        questions = self._read_questions(split, {item.id: item.sentence for item in items})
        out = []
        for item in items:
            asked = questions.get(item.id)
            sentence = self._text(item.sentence)
            out.append(
                replace(
                    item,
                    sentence=f"{sentence} ." if self.append_period else sentence,
                    question=self._text(asked.question) if asked is not None else self._text(item.question),
                    topic=item.topic or ((asked.topic or "") if asked is not None else ""),
                )
            )
        return out

    def _text(self, text: str) -> str:
        text = collapse(text)
        return text.lower() if self.lowercase else text

    def questions_dir(self) -> Path | None:
        """Folder of the question files, or None where there are none.

        Raises:
            UserError: ``questions`` was given and is no folder.
        """
        if self.questions is not None:
            return require_dir(
                self.questions, "question folder", "give the folder that holds train.jsonl, dev.jsonl and test.jsonl"
            )
        candidate = self.questions_default()
        return candidate if candidate is not None and candidate.is_dir() else None

    def questions_default(self) -> Path | None:
        """Where the question folder is looked for when none is given: in the root, else in :meth:`home`."""
        if self.root is None:
            return None
        beside = self.root / "questions"
        return beside if beside.is_dir() else self.home() / "questions"

    def _read_questions(self, split: str, sentences: dict[str, str]) -> dict[str, Any]:
        folder = self.questions_dir()
        if folder is None:
            _log.info("%s %s: no question folder; every question is empty", self.name, split)
            return {}
        from slt.data.questions import read_questions

        return dict(read_questions(folder / f"{split}.jsonl", sentences, allow_missing=self.allow_missing))

    def check(self) -> None:
        """Read all splits and prove that no video stands in two of them.

        Raises:
            UserError: whatever is wrong first.
        """
        owner: dict[str, str] = {}
        for split in SPLITS:
            for item in self.items(split):
                if item.id in owner:
                    raise UserError(
                        f"{self.name}: video {item.id} is in {owner[item.id]} and {split}; a video belongs to one split"
                    )
                owner[item.id] = split

    def fingerprint(self) -> str:
        """Stable sha256 over ids, sentences, questions and frame counts of all splits, in the order of the ids.

        Paths, machine and reading order do not enter; text options do, since they change what a score means.
        """
        digest = hashlib.sha256()
        for split in SPLITS:
            for item in sorted(self.items(split), key=lambda i: i.id):
                row = [split, item.id, item.sentence, item.question, item.num_frames]
                digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What the manifest says about the data: name, fingerprint, text options, sizes of the splits."""
        splits = {}
        for split in SPLITS:
            items = self.items(split)
            splits[split] = {
                "videos": len(items),
                "frames": sum(item.num_frames for item in items),
                "questions": sum(bool(item.question) for item in items),
                "unique_sentences": len({item.sentence for item in items}),
            }
        folder = self.questions_dir()
        return {
            "name": self.name,
            "fingerprint": self.fingerprint(),
            "root": str(self.root) if self.root is not None else None,
            "questions": str(folder) if folder is not None else None,
            "language": self.language,
            "level": self.level,
            "modality": self.modality,
            "lowercase": self.lowercase,
            "append_period": self.append_period,
            "splits": splits,
        }
