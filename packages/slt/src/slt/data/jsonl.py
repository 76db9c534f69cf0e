"""JSONL files with an optional schema header, read so that every complaint has file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from polymodal.errors import UserError

__all__ = ["Migration", "header", "looks_misdecoded", "read_rows"]

_COMMON = re.compile("[\u00c0-\u00ff\u0370-\u045f\u2010-\u203a\u20ac\u3000-\u9fff\uff00-\uffef]")
Migration = Callable[[dict[str, Any]], dict[str, Any]]


def header(schema: str, version: int) -> str:
    """The first line of a file with a schema."""
    return json.dumps({"schema": schema, "schema_version": version})


def read_rows(
    path: Path, schema: str, version: int, migrations: Mapping[int, Migration], *, option: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a JSONL file, brought to the newest version.

    Args:
        path: the file; UTF-8, one object a line, blank lines allowed. The first may be the header; without it the
            file counts as version 1.
        schema: name that a header must have.
        version: newest version that can be read.
        migrations: version -> function that turns a row of that version into one of the next.
        option: what the user should check if the file cannot be read.

    Yields:
        ``(line number from 1, object)``.

    Raises:
        UserError: unreadable file, wrong encoding, bad JSON, another schema, a newer version.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check {option}") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}:1: file is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path.name} > new.jsonl")
    current, first = 1, True
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        row = _object(path, number, raw)
        if first and "schema" in row:
            current = _version(path, number, row, schema, version)
        else:
            for step in range(current, version):
                row = migrations[step](row)
            yield number, row
        first = False


def looks_misdecoded(text: str) -> bool:
    """Whether the text was decoded wrongly before it was written.

    That is: it holds the replacement character or a C1 control, or it is UTF-8 read as Latin-1 or Windows-1252. The
    last is believed only if undoing it gives characters that are common in writing, so that an upper-case accent
    before a guillemet is not mistaken for it.
    """
    if any(c == "\ufffd" or "\x80" <= c <= "\x9f" for c in text):
        return True
    for encoding in ("cp1252", "latin-1"):
        try:
            undone = text.encode(encoding).decode("utf-8")
        except UnicodeError:
            continue
        if undone != text and all(c.isascii() or _COMMON.match(c) for c in undone):
            return True
    return False


def _object(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{number}: byte {raw[error.start]:#04x} at column {error.start + 1} is not UTF-8 (mixed "
            f"encodings?); convert the line, e.g. iconv -f WINDOWS-1252 -t UTF-8"
        ) from None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{number}: not a JSON object ({error.msg} at column {error.colno}); one object a line is expected"
        ) from None
    if not isinstance(row, dict):
        raise UserError(f'{path}:{number}: expected an object {{"video_id": ...}}, got {type(row).__name__}')
    return row


def _version(path: Path, number: int, row: dict[str, Any], schema: str, newest: int) -> int:
    version = row.get("schema_version")
    if row["schema"] != schema or not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UserError(
            f"{path}:{number}: header {json.dumps(row)} is not {header(schema, newest)}; correct or remove it"
        )
    if version > newest:
        raise UserError(
            f"{path}:{number}: schema_version {version} is newer than {newest}, the newest that this version reads; "
            f"update polymodal-slt"
        )
    return version
