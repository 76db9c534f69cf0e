"""What the readers of files share: the root, the first missing file, JSON, fingerprints. No torch (the CLI)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymodal.errors import UserError
from polymodal.paths import require_dir

from missing_modal.data.base import SPLITS, MMData, Sample
from missing_modal.patterns import mask_name
from missing_modal.tables import natural_mask

__all__ = ["FileData", "Listing", "jsonl_rows", "read_json"]


class Listing:
    """Whether files are there, with one look at each folder: a question a file is slow on a network drive.

    Args:
        what: whose files, for messages.
        remedy: what to do where one is missing.
    """

    def __init__(self, what: str, remedy: str) -> None:
        self._what, self._remedy = what, remedy
        self._known: dict[Path, frozenset[str]] = {}

    def need(self, path: Path) -> Path:
        """``path``, which is there.

        Raises:
            UserError: names the file, or its folder where that is missing.
        """
        folder = path.parent
        if folder not in self._known:
            require_dir(folder, self._what, self._remedy)
            self._known[folder] = frozenset(os.listdir(folder))  # noqa: PTH208 (names only)
        if path.name not in self._known[folder]:
            raise UserError(f"{self._what}: {path} is missing; {self._remedy}")
        return path


@dataclass
class FileData(MMData):
    """Base class of the readers of folders."""

    def home(self) -> Path:
        """The folder with the official layout.

        Raises:
            UserError: no root given, or it is no folder.
        """
        if self.root is None:
            raise UserError(f"{self.name}: no root folder; {self.remedy} (--data.root DIR)")
        return require_dir(self.root, f"{self.name} root", self.remedy)

    def check(self) -> None:
        """Read all splits and prove that no row stands in two of them.

        Raises:
            UserError: the first missing file, an empty training or test split, a row in two splits.
        """
        owner: dict[str, str] = {}
        for split in SPLITS:
            found = self.samples(split)
            if not found and split != "val":
                raise UserError(f"{self.name}: the {split} split is empty; {self.remedy}")
            for row in {sample.table_id for sample in found}:
                if row in owner:
                    raise UserError(f"{self.name}: {row} is in {owner[row]} and in {split}; a row belongs to one split")
                owner[row] = split

    def fingerprint(self) -> str:
        """sha256 over ids, texts, labels and what is there, in the order of the ids.

        Paths and pixels do not enter, so that raw files and the Arrow files made of them have the same one.
        """
        known: str | None = self.__dict__.get("_fingerprint")
        if known is None:
            digest = hashlib.sha256(json.dumps([self.class_names(), list(self.modalities)]).encode())
            for split in SPLITS:
                for sample in sorted(self.samples(split), key=lambda one: one.id):
                    line = [split, sample.id, sample.row, self._content(sample), sample.label]
                    digest.update(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            known = self.__dict__["_fingerprint"] = digest.hexdigest()
        return known

    def _content(self, sample: Sample) -> dict[str, Any]:
        """Texts and numbers as they are; of files whether they are there."""
        return {
            name: value if isinstance(value, str | list | tuple) else value is not None
            for name, value in sorted(sample.inputs.items())
        }

    def describe(self) -> dict[str, Any]:
        """Name, fingerprint, sizes and real patterns, for the manifest."""
        splits = {}
        for split in SPLITS:
            found = self.samples(split)
            patterns: dict[str, int] = {}
            for sample in found:
                name = mask_name(natural_mask(sample.inputs, self.modalities), self.modalities)
                patterns[name] = patterns.get(name, 0) + 1
            splits[split] = {
                "samples": len(found),
                "rows": len({sample.table_id for sample in found}),
                "patterns": dict(sorted(patterns.items())),
            }
        return {
            "name": self.name,
            "fingerprint": self.fingerprint(),
            "root": str(self.root) if self.root is not None else None,
            "task": self.task,
            "classes": len(self.class_names()),
            "modalities": list(self.modalities),
            "splits": splits,
        }


def read_json(path: Path, what: str, remedy: str, kind: type = dict) -> Any:
    """Content of a JSON file, an object or a list.

    Raises:
        UserError: missing, not UTF-8, not JSON, or of another kind; names file and place.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{what}: {path} is missing; {remedy}") from error
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read ({error.strerror}); {remedy}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: {path} is not UTF-8; {remedy}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{what}: {path}, line {error.lineno}: not JSON ({error.msg}); {remedy}") from error
    if not isinstance(value, kind):
        raise UserError(f"{what}: {path} holds a {type(value).__name__}, expected a {kind.__name__}; {remedy}")
    return value


def jsonl_rows(path: Path, what: str, remedy: str) -> Iterable[tuple[int, dict[str, Any]]]:
    """Objects of a JSONL file with their line numbers from 1; blank lines are passed over.

    Raises:
        UserError: missing, not UTF-8, a line that is no JSON object; names file and line.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{what}: {path} is missing; {remedy}") from error
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read ({error.strerror}); {remedy}") from error
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8; save the file as UTF-8") from error
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg}); one object a line is expected") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected an object, got {type(row).__name__}; one object a line")
        yield number, row
