"""Pickles of plain values and byte arrays, as Python 2 wrote them, read without importing anything they name.

The official CIFAR batches hold NumPy arrays, so an unpickler that forbids every name cannot read them. This one knows
the three names that an array of bytes needs, and puts stand-ins of its own in their place: nothing that the file says
is ever called.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from polymodal.errors import UserError
from polymodal.paths import require_files

__all__ = ["load_array_pickle"]

_MAX_BYTES = 1 << 30


class _Type:
    """Stands in for ``numpy.dtype``."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, of no matter for bytes."""


class _Array:
    """Stands in for ``numpy.ndarray`` until the file is read."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_column, raw = state
        if not isinstance(kind, _Type) or kind.name not in ("u1", "|u1", "uint8"):
            raise pickle.UnpicklingError(f"it has an array of {getattr(kind, 'name', '?')}, expected bytes (uint8)")
        data = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(data, bytes) or by_column:
            raise pickle.UnpicklingError("its array is not stored row by row")
        self.value = np.frombuffer(bytearray(data), dtype=np.uint8).reshape(shape)


class _Scalar:
    """Stands in for the class that ``_reconstruct`` is given; never created."""


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("it has bytes in an unknown form")
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Scalar,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,  # how Python 3 writes bytes in the old protocols
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it has persistent ids")


def load_array_pickle(path: Path, what: str) -> Any:
    """Load a pickle of plain values and arrays of bytes; texts of Python 2 become ``str`` (latin-1).

    Args:
        path: the file.
        what: name of the data set, for messages.

    Returns:
        The values; arrays as ``numpy.ndarray`` uint8.

    Raises:
        UserError: missing, larger than 1 GiB, broken, or in need of any other class or function.
    """
    require_files(path.parent, [path.name], what)
    if path.stat().st_size > _MAX_BYTES:
        raise UserError(f"{what}: {path} has more than {_MAX_BYTES} bytes; is it the right file?")
    try:
        return _resolved(_Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load())
    except Exception as error:  # a broken pickle can raise nearly anything
        raise UserError(
            f"{what}: {path} is not a pickle of plain values and bytes ({error}); unpack the archive again"
        ) from error


def _resolved(value: Any) -> Any:
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("an array without content")
        return value.value
    if isinstance(value, dict):
        return {_resolved(key): _resolved(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_resolved(entry) for entry in value]
    return value
