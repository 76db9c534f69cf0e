"""Samples of benchmarks in the offline layout of iLLaVA 4.1: ``DIR/<task>/<split>.jsonl`` and ``DIR/<task>/media``.

A line has ``id``, ``question``, ``answer`` or ``answers``, and as wanted ``options``, ``category``, ``group``,
``images`` (paths below the task's media folder) or ``video``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from polymodal.errors import UserError, did_you_mean
from polymodal.paths import read_text_lines

__all__ = ["Sample", "read_jsonl", "read_tasks"]

_KNOWN = {"id", "question", "options", "answer", "answers", "category", "images", "image", "video"}
_LAYOUT = "expected DIR/<task>/<split>.jsonl with DIR/<task>/media"


@dataclass(frozen=True)
class Sample:
    """One question.

    Args:
        task, id: where it is from.
        question: text. options: texts of the choices, in the order of their letters.
        answers: right answers; several people's where there are several.
        category: subtask, where the task has some.
        images: pictures. video: file or folder of frames.
        extra: further keys of the line.
    """

    task: str
    id: str
    question: str
    options: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    category: str = ""
    images: tuple[Path, ...] = ()
    video: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def read_tasks(
    path: Path, tasks: Sequence[str] = (), split: str | None = None, limit: int = 0
) -> tuple[list[Sample], str]:
    """Samples of a JSONL file, or of the tasks of a folder.

    Args:
        path: file or DIR.
        tasks: of DIR; default: all.
        split: of the tasks; default: the only one a task has.
        limit: first samples of each task (0: all).

    Returns:
        samples, and a hash of the files and of what was chosen.

    Raises:
        UserError: nothing there, an unknown task or split, a broken line.
    """
    path = path.expanduser()
    files = [path] if path.is_file() else [_split_file(folder, split) for folder in _task_folders(path, tasks)]
    samples: list[Sample] = []
    digest = hashlib.sha256()
    for file in files:
        found = read_jsonl(file)
        samples += found[:limit] if limit else found
        digest.update(file.read_bytes() + f"|{limit}|".encode())
    return samples, digest.hexdigest()[:16]


def _task_folders(path: Path, tasks: Sequence[str]) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"--data {path}: no such file or folder; {_LAYOUT}, or one JSONL file")
    there = sorted(folder.name for folder in path.iterdir() if any(folder.glob("*.jsonl")))
    if not there:
        raise UserError(f"--data {path}: no task there; {_LAYOUT}")
    for task in tasks:
        if task not in there:
            raise UserError(f"--tasks {task}: not in {path}; {did_you_mean(task, there)}there are: {', '.join(there)}")
    return [path / task for task in tasks or there]


def _split_file(folder: Path, split: str | None) -> Path:
    there = sorted(file.stem for file in folder.glob("*.jsonl"))
    if split is None and len(there) == 1:
        split = there[0]
    if split not in there:
        what = f"--split {split}: not in {folder}" if split else f"{folder} has several splits; choose one with --split"
        raise UserError(f"{what}; there are: {', '.join(there)}")
    return folder / f"{split}.jsonl"


def read_jsonl(file: Path) -> list[Sample]:
    """All samples of one file; the task is the name of its folder.

    Raises:
        UserError: no samples, or a broken line; the message has file and line.
    """
    lines = read_text_lines(file, "benchmark", "give a JSONL file")
    task = file.resolve().parent.name
    samples = list(_samples(file, task, lines))
    if not samples:
        raise UserError(f"{file}: no samples in it; {_LAYOUT}")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise UserError(f"{file}: id {sample.id!r} stands there twice; give each sample its own")
        seen.add(sample.id)
    return samples


def _samples(file: Path, task: str, lines: Sequence[str]) -> Iterator[Sample]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON ({error}); one object a line") from error
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise UserError(f"{where}: expected an object with question, answer or answers, and images or video")
        yield _sample(file, task, row, where, number)


def _sample(file: Path, task: str, row: dict[str, Any], where: str, number: int) -> Sample:
    answers = row.get("answers", row.get("answer"))
    images = row.get("images", row.get("image", []))
    return Sample(
        task=task,
        id=str(row.get("id", number)),
        question=row["question"],
        options=_texts(row.get("options") or [], where, "options"),
        answers=_texts([] if answers is None else answers, where, "answers"),
        category=str(row.get("category") or ""),
        images=tuple(_media(file.parent, name, where) for name in _texts(images or [], where, "images")),
        video=_media(file.parent, str(row["video"]), where) if row.get("video") else None,
        extra={key: value for key, value in row.items() if key not in _KNOWN},
    )


def _texts(value: Any, where: str, name: str) -> tuple[str, ...]:
    """One text or number, or a list of them."""
    given = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in given):
        raise UserError(f"{where}: {name}: expected a text or a list of texts")
    return tuple(str(one) for one in given)


def _media(folder: Path, name: str, where: str) -> Path:
    """A file below the task's media folder (or the task's own folder).

    Raises:
        UserError: a path that leads out of it, or nothing there.
    """
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{where}: {name!r}: media are paths below {folder / 'media'}, without / in front and ..")
    for base in (folder / "media", folder):
        if (base / relative).exists():
            return base / relative
    raise UserError(f"{where}: {folder / 'media' / relative} is missing; copy the media there")
