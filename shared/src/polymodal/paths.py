"""Where things are: the cache folder, folder checks that name the first missing file, text lines of a file."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from polymodal.errors import UserError

__all__ = ["cache_dir", "natural_key", "read_text_lines", "require_dir", "require_files"]


def cache_dir(*parts: str) -> Path:
    """Folder for things that can be made again: ``$POLYMODAL_CACHE``, else the platform's user cache.

    Args:
        parts: sub-folders, e.g. ``("slt", "worlds")``.

    Returns:
        The path; it is not created.
    """
    named = os.environ.get("POLYMODAL_CACHE")
    if named:
        return Path(named).expanduser().joinpath(*parts)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base.joinpath("polymodal", *parts)


def require_dir(path: Path | str, what: str, remedy: str = "") -> Path:
    """``path`` as a Path when it is a folder.

    Args:
        path: the folder.
        what: what it holds, for the message, e.g. ``"PHOENIX-2014T root"``.
        remedy: what to do when it is missing.

    Raises:
        UserError: nothing there, or a file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return path
    state = "is a file, not a folder" if path.exists() else "does not exist"
    raise UserError(f"{what}: {path} {state}{'; ' + remedy if remedy else ''}")


def require_files(root: Path | str, names: Iterable[str], what: str, remedy: str = "") -> list[Path]:
    """Paths of ``names`` below ``root``, all of them present.

    Raises:
        UserError: names the first one that is missing, and how many are missing in all.
    """
    paths = [Path(root).expanduser() / name for name in names]
    missing = [path for path in paths if not path.exists()]
    if missing:
        more = f" ({len(missing)} of {len(paths)} files are missing)" if len(missing) > 1 else ""
        raise UserError(f"{what}: {missing[0]} is missing{more}{'; ' + remedy if remedy else ''}")
    return paths


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which ``frame2`` comes before ``frame10``."""
    parts = re.split(r"(\d+)", name)
    return tuple((1, int(p), "") if p.isdecimal() else (0, 0, p) for p in parts)


def read_text_lines(path: Path, what: str, remedy: str = "copy it there, or correct the path") -> list[str]:
    """Lines of an utf-8 text file, with or without a byte-order mark, LF or CRLF.

    Args:
        path: the file.
        what: what it is, for messages.
        remedy: what to do when it is missing.

    Returns:
        Lines without their ends; line ``i`` of the list is line ``i + 1`` of the file.

    Raises:
        UserError: the file is missing, or a line is not utf-8 (mixed encodings); the message has file and line.
    """
    require_files(path.parent, [path.name], what, remedy)
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    lines: list[str] = []
    for number, raw in enumerate(data.split(b"\n"), start=1):
        try:
            lines.append(raw.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{what}: {path}, line {number}: byte 0x{raw[error.start]:02x} is not utf-8; save the whole file"
                " as utf-8 (for a Latin-1 file: iconv -f latin1 -t utf-8)"
            ) from error
    if lines and not lines[-1]:
        lines.pop()
    return lines
