"""Many arrays in one memory-mapped file with a JSON index: what decoded frames and frozen features are kept in."""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from polymodal.errors import UserError
from polymodal.paths import require_files

__all__ = ["ArrayCache", "ArrayCacheWriter"]

_SCHEMA = "polymodal.arrays"
_VERSION = 1
_DTYPES = ("uint8", "float16", "float32", "int64")
_ALIGN = 64
_log = logging.getLogger(__name__)


class ArrayCacheWriter:
    """Writes a cache folder that appears under its name only when it is complete.

    >>> with ArrayCacheWriter(folder, {"size": 256}) as writer:  # doctest: +SKIP
    ...     writer.add("clip-1", frames)

    Args:
        folder: the cache; must not exist unless ``overwrite``.
        meta: JSON values that say what is in it (transform, weights' hash, fingerprint); the reader returns them.
        overwrite: replace an existing cache once the new one is complete.

    Raises:
        UserError: the folder exists, cannot be written, or the disk is full (nothing is left behind then).
    """

    def __init__(self, folder: Path | str, meta: Mapping[str, Any] | None = None, *, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        self.meta = dict(meta or {})
        self.overwrite = overwrite
        self._arrays: dict[str, tuple[int, str, list[int]]] = {}
        self._offset = 0

    def __enter__(self) -> Self:
        if self.folder.exists() and not self.overwrite:
            raise UserError(f"cache {self.folder} exists; remove it or choose another folder")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=f".{self.folder.name}."))
            self._file = (self._temporary / "data.bin").open("wb")
        except OSError as error:
            raise self._explain(error) from error
        return self

    def add(self, key: str, array: np.ndarray) -> None:
        """Append one array.

        Args:
            key: its name, e.g. the video's id; each once.
            array: uint8, float16, float32 or int64, any shape.

        Raises:
            UserError: the key is there already, another dtype, or the disk is full.
        """
        if key in self._arrays:
            raise UserError(f"cache {self.folder}: key {key!r} was added before; keys are unique")
        if array.dtype.name not in _DTYPES:
            raise UserError(f"cache {self.folder}: {key!r} is {array.dtype}; allowed are {', '.join(_DTYPES)}")
        gap = -self._offset % _ALIGN
        try:
            self._file.write(b"\0" * gap)
            self._file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
        except OSError as error:
            raise self._explain(error) from error
        self._arrays[key] = (self._offset + gap, array.dtype.name, list(array.shape))
        self._offset += gap + array.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if kind is not None:
                return
            index = {"schema": _SCHEMA, "schema_version": _VERSION, "bytes": self._offset, "meta": self.meta}
            index["arrays"] = self._arrays
            (self._temporary / "index.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
            self._temporary.chmod(0o755)
            if self.folder.exists():
                old = self._temporary.with_name(self._temporary.name + ".old")
                self.folder.rename(old)
                self._temporary.rename(self.folder)
                shutil.rmtree(old, ignore_errors=True)
            else:
                self._temporary.rename(self.folder)
        except OSError as problem:
            raise self._explain(problem) from problem
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _explain(self, error: OSError) -> UserError:
        return UserError(
            f"cache {self.folder}: cannot be written ({error.strerror}) after {self._offset} bytes;"
            " free space or choose another folder"
        )


class ArrayCache:
    """Reads a cache folder; arrays are read-only views into the mapped file, loaded by the system page by page.

    Args:
        folder: a folder that :class:`ArrayCacheWriter` wrote.

    Raises:
        UserError: no such cache, a newer schema, or a data file that does not have the size of its index.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index_path, data_path = require_files(self.folder, ["index.json", "data.bin"], "array cache")
        try:
            index = json.loads(index_path.read_text(encoding="utf-8"))
            self._check(index, data_path.stat().st_size)
            self.meta: dict[str, Any] = index["meta"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"array cache: {index_path} is broken ({error}); remove the folder and build it") from error
        self._arrays: dict[str, tuple[int, str, list[int]]] = index["arrays"]
        self._map: np.ndarray | None = None

    def _check(self, index: dict[str, Any], size: int) -> None:
        if index["schema"] != _SCHEMA:
            raise ValueError(f"schema {index['schema']!r}, expected {_SCHEMA!r}")
        if index["schema_version"] > _VERSION:
            raise UserError(
                f"array cache {self.folder} has schema version {index['schema_version']}, known is {_VERSION};"
                " update polymodal or build the cache again"
            )
        if size != index["bytes"]:
            raise ValueError(f"data.bin has {size} bytes, the index says {index['bytes']}")
        for key, (offset, dtype, shape) in index["arrays"].items():
            if dtype not in _DTYPES or offset < 0 or any(not isinstance(n, int) or n < 0 for n in shape):
                raise ValueError(f"entry {key!r}: {offset}, {dtype}, {shape}")
            if offset + math.prod(shape) * np.dtype(dtype).itemsize > size:
                raise ValueError(f"entry {key!r} reaches past the end of data.bin")

    def __contains__(self, key: object) -> bool:
        return key in self._arrays

    def __len__(self) -> int:
        return len(self._arrays)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __getitem__(self, key: str) -> np.ndarray:
        """One array, read-only.

        Raises:
            UserError: no such key.
        """
        if key not in self._arrays:
            raise UserError(f"array cache {self.folder} has no {key!r} ({len(self)} keys); build it for this data")
        offset, dtype, shape = self._arrays[key]
        if self._map is None:
            path = self.folder / "data.bin"
            self._map = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        view = np.asarray(self._map)[offset : offset + size].view(dtype).reshape(shape)
        view.flags.writeable = False
        return view

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # a worker process maps the file itself
