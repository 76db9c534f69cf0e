"""Writes that a kill cannot leave half done: temporary file in the same folder, flush to disk, rename."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from polymodal.errors import UserError

__all__ = [
    "append_text",
    "atomic_write",
    "check_writable",
    "remove_unfinished",
    "write_bytes",
    "write_json",
    "write_text",
]


def atomic_write(path: Path, writer: Callable[[BinaryIO], Any]) -> None:
    """Write ``path`` through ``writer(handle)`` so that at any moment the file is the old one or the new one.

    Args:
        path: file to make or replace; its folder must exist.
        writer: receives a binary handle.

    Raises:
        UserError: disk full or folder not writable; an older ``path`` is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            writer(handle)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = _os_error(error)
        if cause is None:
            raise
        raise _explain(path, cause) from error


def write_bytes(path: Path, content: bytes) -> None:
    """``atomic_write`` of a whole content."""
    atomic_write(path, lambda handle: handle.write(content))


def write_text(path: Path, text: str) -> None:
    """``atomic_write`` of a UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def append_text(path: Path, text: str) -> None:
    """Append a UTF-8 text to ``path``. Not atomic: a kill or a full disk may leave a part of it.

    Raises:
        UserError: disk full or file not writable.
    """
    try:
        with path.open("a", encoding="utf-8", newline="") as handle:
            handle.write(text)
    except OSError as error:
        raise _explain(path, error) from error


def remove_unfinished(folder: Path) -> None:
    """Remove what writes that were killed half-way left below ``folder``: a checkpoint may have gigabytes."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """``atomic_write`` of an indented JSON file."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_writable(folder: Path) -> None:
    """Make ``folder`` and prove that a file can be written there.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from error


def _os_error(error: BaseException) -> OSError | None:
    """The operating system's error behind ``error``: torch.save hides one behind a RuntimeError about positions."""
    if isinstance(error, OSError):
        return error
    behind = error.__context__ if isinstance(error, RuntimeError) else None
    return behind if isinstance(behind, OSError) else None


def _explain(path: Path, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free / 2**20
        return UserError(
            f"disk full while writing {path} ({free:.0f} MiB free); what was written before is intact: "
            "free some space and continue with --resume"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
        return UserError(f"cannot write {path}: {error.strerror}; check the folder or choose another with --out")
    return error
