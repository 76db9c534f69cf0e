"""Pictures of each step as text files with checksums, so that others can train on exactly the same ones. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.errors import UserError, did_you_mean
from polymodal.files import check_writable, write_text
from polymodal.paths import read_text_lines

from css.data.scenarios import select_test, select_train

if TYPE_CHECKING:
    from css.data.base import SegData
    from css.task import Task

__all__ = ["SplitFile", "read_split", "split_path", "step_indices", "write_split", "write_splits"]

_TITLE = "# pictures of one step of a continual segmentation task, one id a line"
_CHECKSUM = "sha256"


@dataclass(frozen=True)
class SplitFile:
    """Pictures of one step.

    Args:
        ids: picture ids, in the order of the data set.
        header: ``data, split, step, task, setting, order, classes, seed, pictures``, as text.
        sha256: of the id lines.
    """

    ids: tuple[str, ...]
    header: dict[str, str]
    sha256: str


def split_path(folder: Path, split: str, step: int) -> Path:
    """File of a step: ``<folder>/<split>-step<N>.txt``."""
    return folder / f"{split}-step{step}.txt"


def write_split(path: Path, ids: Sequence[str], header: dict[str, str]) -> None:
    """Write one file: comments with the header and the checksum, then one id a line.

    Raises:
        ValueError: an id or a header value with a line break.
        UserError: the file cannot be written.
    """
    for text in (*ids, *header.values()):
        if "\n" in text or "\r" in text:
            raise ValueError(f"line break in {text!r}; a split file has one id a line")
    lines = [_TITLE, *(f"# {key}: {value}" for key, value in header.items()), f"# {_CHECKSUM}: {_digest(ids)}"]
    write_text(path, "\n".join([*lines, *ids]) + "\n")


def read_split(path: Path) -> SplitFile:
    """Read one file and verify its checksum; line ends may be LF or CRLF.

    Raises:
        UserError: it is missing, has no checksum, or its ids were changed since; names the file.
    """
    header: dict[str, str] = {}
    lines = read_text_lines(path, "split file")
    for number, line in enumerate(lines, start=1):
        key, colon, value = line.removeprefix("# ").partition(": ")
        if not line.startswith("#"):
            break
        if colon:
            header[key] = value.strip()
        if key == _CHECKSUM:
            ids = tuple(lines[number:])
            _verify(path, ids, header)
            return SplitFile(ids, header, header[_CHECKSUM])
    raise UserError(f"split file {path} has no line '# {_CHECKSUM}: ...' above its ids; write it with css-data prepare")


def write_splits(folder: Path, reader: SegData, task: Task, setting: str, seed: int = 0) -> list[Path]:
    """Write ``{train,test}-step<N>.txt`` for every step of a task.

    Args:
        folder: made if need be.
        reader: the data set.
        task: classes by step.
        setting: overlap, disjoint, sequential or partitioned.
        seed: of ``partitioned``.

    Returns:
        The files, by step.

    Raises:
        UserError: a step without pictures, or a folder that cannot be written; nothing is written then.
    """
    texts = []
    for step in range(task.num_steps):
        for split in ("train", "test"):
            chosen = _selected(reader, task, setting, step, split, seed)
            items = reader.items(split)
            header = {"data": reader.name, "split": split, "step": str(step)} | _described(task, setting)
            header |= {"seed": str(seed), "pictures": str(len(chosen))}
            texts.append((split_path(folder, split, step), [items[i].id for i in chosen], header))
    check_writable(folder)
    for path, ids, header in texts:
        write_split(path, ids, header)
    return [path for path, _, _ in texts]


def step_indices(reader: SegData, task: Task, setting: str, step: int, split: str, seed: int = 0) -> list[int]:
    """Pictures of a step: from ``reader.split_files`` where that is given, else selected by the setting.

    Validation pictures are always selected, by the rule of test pictures, and may be none.

    Args:
        reader: the data set.
        task: classes by step.
        setting: overlap, disjoint, sequential or partitioned.
        step: continual step, from 0.
        split: ``train``, ``val`` or ``test``.
        seed: of ``partitioned``.

    Returns:
        Indices into ``reader.items(split)``; from a split file in its order.

    Raises:
        UserError: a step without pictures; a split file that is missing, was changed, belongs to another task, setting
            or class order, or names a picture that the data set lacks.
    """
    if reader.split_files is None or split == "val":
        return _selected(reader, task, setting, step, split, seed)
    path = split_path(reader.split_files, split, step)
    found = read_split(path)
    _check_header(path, found, {"split": split, "step": str(step)} | _described(task, setting))
    places = {item.id: place for place, item in enumerate(reader.items(split))}
    for identifier in found.ids:
        if identifier not in places:
            hint = did_you_mean(identifier, places) if len(places) < 1000 else ""
            raise UserError(
                f"split file {path}: picture {identifier} is not in the {split} split of {reader.name}; {hint}give the"
                " data set and val_share the files were written with"
            )
    if not found.ids:
        raise UserError(f"split file {path} has no ids; write it again with css-data prepare")
    return [places[identifier] for identifier in found.ids]


def _selected(reader: SegData, task: Task, setting: str, step: int, split: str, seed: int) -> list[int]:
    items = reader.items(split)
    sets, names = reader.class_sets(split) if items else [], reader.class_names()
    if split != "train":
        return select_test(task, sets, step, names=names, allow_empty=split == "val")
    return select_train(task, sets, setting, step, ids=[item.id for item in items], seed=seed, names=names)


def _described(task: Task, setting: str) -> dict[str, str]:
    """What two runs must share to have the same pictures; the order of classes within a step does not matter."""
    order = " | ".join(",".join(map(str, sorted(ids))) for ids in task.steps)
    return {"task": task.name, "setting": setting, "order": order, "classes": str(task.num_classes)}


def _check_header(path: Path, found: SplitFile, wanted: dict[str, str]) -> None:
    """Whether a file is this run's; two task names with equal steps are the same task."""
    for key in ("split", "step", "setting", "order"):
        given, here = found.header.get(key, "nothing"), wanted[key]
        if given == here:
            continue
        if key == "order":
            given, here = (f"{header.get('task', '?')} with other classes" for header in (found.header, wanted))
            key = "task"
        raise UserError(
            f"split file {path} was written for {key} {given}, this run has {here}; give the folder that was written"
            " for it, or none"
        )


def _verify(path: Path, ids: Sequence[str], header: dict[str, str]) -> None:
    if len(set(ids)) != len(ids):
        twice = next(name for place, name in enumerate(ids) if name in ids[:place])
        raise UserError(f"split file {path}: {twice} occurs twice; copy the file again")
    if _digest(ids) != header[_CHECKSUM]:
        raise UserError(
            f"split file {path}: its {len(ids)} ids do not have the checksum {header[_CHECKSUM][:12]}... in its header,"
            f" which speaks of {header.get('pictures', '?')}; copy the file again, or write it with css-data prepare"
        )


def _digest(ids: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{name}\n" for name in ids).encode()).hexdigest()
