"""Rows of text files by column: TSV without quoting, as GLUE has it, CSV, and JSON with one object a row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from polymodal.errors import UserError
from polymodal.paths import read_text_lines

__all__ = ["pick", "read_table"]

_MAX_FIELD = 1 << 24


def read_table(path: Path, what: str, header: Sequence[str] = ()) -> tuple[list[str], list[dict[str, str]], int]:
    """Rows of a file by column.

    Args:
        path: ``.tsv`` (no quoting, as the official files are), ``.csv`` (quoted), ``.json`` (a list of objects) or
            ``.jsonl``, or a ``.json`` with one object a line.
        what: name of the data set, for messages.
        header: columns of a TSV without a header line.

    Returns:
        Columns, rows, and how many lines were left out because cells are missing (QQP has some).

    Raises:
        UserError: missing, empty or broken file.
    """
    if path.suffix == ".tsv":
        columns, cells, skipped = _tsv(path, what, header)
    elif path.suffix == ".csv":
        columns, cells, skipped = _csv(path, what)
    else:
        columns, cells, skipped = _json(path, what)
    if not cells:
        raise UserError(f"{what}: {path} has no rows; copy it again")
    return columns, [dict(zip(columns, row, strict=False)) for row in cells], skipped


def pick(columns: Sequence[str], wanted: Sequence[str], path: Path, what: str, which: str) -> str:
    """The first of the ``wanted`` columns that is there.

    Raises:
        UserError: none is.
    """
    for name in wanted:
        if name in columns:
            return name
    raise UserError(
        f"{what}: {path} has no column for the {which} ({' or '.join(wanted)}) but {', '.join(columns[:12])}; rename it"
    )


def _tsv(path: Path, what: str, header: Sequence[str]) -> tuple[list[str], list[list[str]], int]:
    lines = [line.split("\t") for line in read_text_lines(path, what) if line]
    columns = list(header) if header else lines.pop(0) if lines else []
    # Further cells at the end of a line (annotators' labels in MNLI's) are of no concern.
    whole = [cells for cells in lines if len(cells) >= len(columns)]
    return columns, whole, len(lines) - len(whole)


def _csv(path: Path, what: str) -> tuple[list[str], list[list[str]], int]:
    text = "\n".join(read_text_lines(path, what))
    csv.field_size_limit(_MAX_FIELD)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except csv.Error as error:
        raise UserError(f"{what}: {path} cannot be read as CSV ({error}); save it as CSV again") from error
    columns = rows.pop(0) if rows else []
    whole = [row for row in rows if len(row) >= len(columns)]
    return columns, whole, len(rows) - len(whole)


def _json(path: Path, what: str) -> tuple[list[str], list[list[str]], int]:
    lines = read_text_lines(path, what)
    text = "\n".join(lines)
    try:
        if path.suffix == ".json" and text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise UserError(f"{what}: {path} cannot be read as JSON ({error}); save it again, one object a row") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{what}: {path} holds something else than objects with a column for each part")
    columns = list(rows[0]) if rows else []
    whole = [row for row in rows if all(row.get(name) is not None for name in columns)]
    return columns, [[str(row[name]) for name in columns] for row in whole], len(rows) - len(whole)
