"""Readers for files that are not trusted: pickles without globals, archives that stay in their folder."""

from __future__ import annotations

import io
import lzma
import pickle
import re
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Any

from polymodal.errors import UserError
from polymodal.paths import require_files

__all__ = ["safe_extract", "safe_unpickle"]


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
        raise UserError(f"{what}: {path} is not a pickle of plain values ({error}); download it again") from error


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
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"archive {archive}: cannot be unpacked into {folder} ({reason}); download it again") from error


def _plan(sizes: list[tuple[str, int]], archive: Path, folder: Path, max_bytes: int) -> list[Path]:
    total = sum(size for _, size in sizes)
    if total > max_bytes:
        raise UserError(f"archive {archive}: unpacks to {total} bytes, more than the {max_bytes} allowed")
    targets = [_safe_target(folder, name, archive) for name, _ in sizes]
    folder.mkdir(parents=True, exist_ok=True)
    return targets
