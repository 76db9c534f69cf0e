"""A memory's folder on disk: replaced as a whole, read with its identity checked. No torch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError
from polymodal.files import write_json

if TYPE_CHECKING:
    from css.task import Task

__all__ = ["INDEX", "SCHEMA_VERSION", "damaged", "describe_task", "locate", "read_index", "recover", "replace_folder"]

INDEX = "index.json"
SCHEMA_VERSION = 1
"""Of the index; a newer one is refused."""
_REMEDY = "build it again: delete the folder and resume the run"


def recover(folder: Path) -> None:
    """Undo what a killed write left beside ``folder``: its half-written copy goes, a state set aside returns."""
    aside = _aside(folder)
    if aside.is_dir():
        if (folder / INDEX).is_file():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
    shutil.rmtree(_unfinished(folder), ignore_errors=True)


def locate(folder: Path) -> Path:
    """Where the memory of ``folder`` is: there, or aside where a kill came between two renames. Changes nothing."""
    aside = _aside(folder)
    return aside if not (folder / INDEX).is_file() and (aside / INDEX).is_file() else folder


def replace_folder(folder: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    """Write a folder so that at any moment the old state or the new one is there, whole.

    Args:
        folder: to be made or replaced; its parent is made.
        write: gets the path of an empty folder to write files into, returns what goes into the index.

    Raises:
        UserError: the folder cannot be written or the disk is full; the old state is left.
    """
    unfinished, aside = _unfinished(folder), _aside(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        recover(folder)
        unfinished.mkdir()
        index = write(unfinished)
        write_json(unfinished / INDEX, index)
        _flush(unfinished)
        if folder.exists():
            folder.rename(aside)
        unfinished.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"memory {folder}: cannot be written ({reason}); free some space and resume") from error
    finally:
        recover(folder)


def describe_task(task: Task) -> dict[str, Any]:
    """What makes channels mean the same classes."""
    return {"name": task.name, "num_classes": task.num_classes, "order": list(task.order)}


def read_index(folder: Path, kind: str, *, task: Task | None, fingerprint: str | None) -> dict[str, Any]:
    """The index of a memory that fits a run.

    Args:
        folder: of the memory, see ``locate``.
        kind: ``instances`` or ``images``.
        task: the run's; None: any.
        fingerprint: of the run's data set; None: any.

    Raises:
        UserError: no memory, a damaged index, a newer schema, or a memory of another kind, task or data set.
    """
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"memory {folder}: {INDEX} is missing; give the folder steps/NN/memory of a run with a memory")
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, found = index["schema_version"], index["kind"]
        known, data = index["task"], index["data"]["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"memory {path} is damaged ({error}); {_REMEDY}") from error
    if version > SCHEMA_VERSION:
        raise UserError(f"memory {path}: schema version {version} is newer than {SCHEMA_VERSION}; update css")
    if found != kind:
        raise UserError(f"memory {path} keeps {found}, this method replays {kind}; give the memory of such a method")
    if fingerprint is not None and data != fingerprint:
        raise UserError(
            f"memory {path} is of the data set {index['data'].get('name', '?')} ({data}), this run's is {fingerprint};"
            " give the same data, or build the memory in a new run"
        )
    if task is not None and known != describe_task(task):
        same = known.get("name") == task.name and known.get("num_classes") == task.num_classes
        other = "the same task with another class order" if same else f"task {known.get('name', '?')}"
        raise UserError(f"memory {path} is of {other}, this run of {task.name}; build the memory in a new run")
    return index


def damaged(path: Path, error: Exception) -> UserError:
    """What to say about an index with entries that cannot be understood."""
    return UserError(f"memory {path} is damaged ({type(error).__name__}: {error}); {_REMEDY}")


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.unfinished")


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.before")


def _flush(folder: Path) -> None:
    """Ask the system to bring a folder's list of files to the disk, where it can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
