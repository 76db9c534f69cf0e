"""Files on disk: folder checks that name the first missing file, atomic writes, and readers for untrusted files."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from polymodal.errors import UserError

__all__ = [
    "atomic_write",
    "cache_dir",
    "natural_key",
    "read_text_lines",
    "require_dir",
    "require_files",
    "safe_extract",
    "safe_unpickle",
]


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


def read_text_lines(path: Path, what: str) -> list[str]:
    """Lines of an utf-8 text file, with or without a byte-order mark, LF or CRLF.

    Args:
        path: the file.
        what: what it is, for messages.

    Returns:
        Lines without their ends; line ``i`` of the list is line ``i + 1`` of the file.

    Raises:
        UserError: the file is missing, or a line is not utf-8 (mixed encodings); the message has file and line.
    """
    require_files(path.parent, [path.name], what)
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    lines: list[str] = []
    for number, raw in enumerate(data.split(b"\n"), start=1):
        try:
            lines.append(raw.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{what}: {path}, line {number}: byte 0x{raw[error.start]:02x} is not utf-8; save the whole file as utf-8"
                " (for a Latin-1 file: iconv -f latin1 -t utf-8)"
            ) from error
    if lines and not lines[-1]:
        lines.pop()
    return lines


@contextlib.contextmanager
def atomic_write(path: Path | str, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` that takes its name only when the block ends without an error.

    A reader, or a run killed at any moment, sees the old file or the new one, never half of one.

    Args:
        path: where the file shall be; its folder is created.
        mode: ``"w"`` (utf-8 text with LF ends) or ``"wb"``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    binary = "b" in mode
    try:
        with os.fdopen(handle, mode, encoding=None if binary else "utf-8", newline=None if binary else "\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class _NoGlobals(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it has persistent ids")


def safe_unpickle(path: Path, what: str = "pickle", max_bytes: int = 1 << 30) -> Any:
    """Load a pickle of plain values (dict, list, tuple, set, str, bytes, numbers, None).

    Args:
        path: the file.
        what: what it is, for messages.
        max_bytes: a larger file is refused before it is read.

    Raises:
        UserError: missing, too large, broken, or in need of any class or function (which could run code).
    """
    require_files(path.parent, [path.name], what)
    size = path.stat().st_size
    if size > max_bytes:
        raise UserError(f"{what}: {path} has {size} bytes, more than the {max_bytes} allowed; is it the right file?")
    try:
        return _NoGlobals(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a broken pickle can raise nearly anything
        raise UserError(
            f"{what}: {path} is not a pickle of plain values ({error}); download it again, or save it as dicts and lists"
        ) from error


def _safe_target(folder: Path, name: str, archive: Path) -> Path:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or re.match(r"[A-Za-z]:", name):
        raise UserError(f"archive {archive}: member {name!r} points outside the folder; the archive is not trustworthy")
    return folder.joinpath(*parts.parts)


def _copy(source: IO[bytes], target: Path, size: int, archive: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    left = size
    with target.open("wb") as out:
        while chunk := source.read(1 << 20):
            left -= len(chunk)
            if left < 0:
                raise UserError(f"archive {archive}: {target.name} is larger than the archive says; download it again")
            out.write(chunk)
    if left:
        raise UserError(f"archive {archive}: {target.name} is cut short by {left} bytes; download it again")


def safe_extract(archive: Path, folder: Path, max_bytes: int = 64 << 30) -> list[Path]:
    """Unpack a zip or tar archive: plain files only, nothing outside ``folder``, sizes checked before writing.

    Args:
        archive: ``.zip``, ``.tar``, ``.tar.gz``, ``.tar.bz2`` or ``.tar.xz``.
        folder: target; created.
        max_bytes: bound on the sum of the unpacked sizes.

    Returns:
        The files written, in archive order.

    Raises:
        UserError: absolute or parent path, a link or device, too large, or a broken archive.
    """
    require_files(archive.parent, [archive.name], "archive")
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as bundle:
                sizes = [(i.filename, i.file_size) for i in bundle.infolist() if not i.is_dir()]
                targets = _plan(sizes, archive, folder, max_bytes)
                for (name, size), target in zip(sizes, targets, strict=True):
                    with bundle.open(name) as source:
                        _copy(source, target, size, archive)
            return targets
        with tarfile.open(archive) as tape:
            members = [m for m in tape.getmembers() if not m.isdir()]
            for member in members:
                if not member.isfile():
                    raise UserError(
                        f"archive {archive}: member {member.name!r} is a link or device; only files are taken"
                    )
            targets = _plan([(m.name, m.size) for m in members], archive, folder, max_bytes)
            for member, target in zip(members, targets, strict=True):
                opened = tape.extractfile(member)
                assert opened is not None  # isfile() was checked
                with opened:
                    _copy(opened, target, member.size, archive)
        return targets
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"archive {archive}: cannot be unpacked into {folder} ({error}); download it again") from error


def _plan(sizes: list[tuple[str, int]], archive: Path, folder: Path, max_bytes: int) -> list[Path]:
    total = sum(size for _, size in sizes)
    if total > max_bytes:
        raise UserError(f"archive {archive}: unpacks to {total} bytes, more than the {max_bytes} allowed")
    targets = [_safe_target(folder, name, archive) for name, _ in sizes]
    folder.mkdir(parents=True, exist_ok=True)
    return targets
