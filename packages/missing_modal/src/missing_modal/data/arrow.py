"""Arrow files in the form of the official code: IPC file format, one row a sample, images as encoded bytes.

Source: DCP's ``clip/utils/write_*.py`` (columns and names; DCP 4.1). Needs the extra
``polymodal-missing-modal[arrow]``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from polymodal.errors import UserError
from polymodal.files import atomic_write

__all__ = ["ArrowCell", "columns", "has_arrow", "write_table"]

BATCH_ROWS = 500
"""rows of a record batch that is written: bounds the memory, and int32 offsets hold 2 GiB a batch only"""


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            'Arrow files need pyarrow; install it: uv pip install "polymodal-missing-modal[arrow]", or use raw folders'
        ) from error
    return pyarrow


@functools.lru_cache(maxsize=8)
def _table(path: str, size: int, changed: int) -> Any:
    """The mapped table; a file that changed is opened anew."""
    pa = _pyarrow()
    try:
        return pa.ipc.RecordBatchFileReader(pa.memory_map(path)).read_all()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{path} cannot be read as an Arrow IPC file ({reason}); write it again with mm-data convert"
        ) from error


def _open(path: Path) -> Any:
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"{path} is missing; write it with mm-data convert, or give the raw folder") from error
    return _table(str(path), state.st_size, state.st_mtime_ns)


@dataclass(frozen=True)
class ArrowCell:
    """Image bytes in row ``row`` of a file: read when asked for, so that lists of samples and workers stay small."""

    path: Path
    row: int
    column: str = "image"

    def read(self) -> bytes:
        """The encoded image."""
        value = _open(self.path)[self.column][self.row].as_py()
        return bytes(value)

    def __str__(self) -> str:
        return f"{self.path}, row {self.row}"


def has_arrow(folder: Path, prefix: str) -> bool:
    """Whether ``folder`` holds Arrow files of a data set."""
    return any((folder / f"{prefix}_{split}.arrow").is_file() for split in ("train", "dev", "val", "test"))


def columns(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Columns of a file as lists; images stay in the file.

    Args:
        path: the file.
        needed: columns that must be there; ``image`` is looked for and not read.
        optional: columns that are left out where the file lacks them.

    Raises:
        UserError: missing file, another format, a missing column.
    """
    table = _open(path)
    for name in needed:
        if name not in table.column_names:
            raise UserError(
                f"{path}: no column {name!r} (it has {', '.join(table.column_names)}); write it again with "
                "mm-data convert"
            )
    wanted = [name for name in (*needed, *optional) if name in table.column_names and name != "image"]
    return {name: table[name].to_pylist() for name in wanted}


def write_table(path: Path, rows: Iterable[dict[str, Any]], label: str) -> int:
    """Write rows with the columns of the official files, whole or not at all.

    Args:
        path: the file.
        rows: image (bytes), texts (list of str) and further values by column; all rows have the same columns.
        label: ``int`` or ``list``: type of the column ``label``.

    Returns:
        Number of rows.

    Raises:
        UserError: the file cannot be written, or a row cannot be read.
    """
    pa = _pyarrow()
    number = pa.int64()
    types = {
        "image": pa.binary(),
        "plots": pa.list_(pa.string()),
        "text": pa.list_(pa.string()),
        "genres": pa.list_(pa.string()),
        "label": number if label == "int" else pa.list_(number),
    }
    count = 0

    def write(stream: BinaryIO) -> None:
        nonlocal count
        writer = None
        for part in _parts(rows):
            names = list(part[0])
            schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
            writer = writer or pa.ipc.RecordBatchFileWriter(stream, schema)
            held = [pa.array([row[name] for row in part], type=schema.field(name).type) for name in names]
            writer.write_batch(pa.record_batch(held, schema=schema))
            count += len(part)
        if writer is None:
            raise UserError(f"{path}: no rows to write; the split is empty")
        writer.close()

    atomic_write(path, write)
    return count


def _parts(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    for row in rows:
        part.append(row)
        if len(part) == BATCH_ROWS:
            yield part
            part = []
    if part:
        yield part
