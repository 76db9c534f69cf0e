"""Files of translations and references: read with file and line in every complaint, since anybody may have made them.

Predictions are JSONL, ``{"video_id": ..., "prediction": ...}`` a line (the key ``hypothesis`` does as well, further
keys are ignored), or, in a file of any other ending than ``.jsonl`` or ``.json``, plain text: one line a clip in the
order of the split's annotation, an empty line where there is no translation. References are JSONL,
``{"video_id", "sentence", "question"?}``; a question file of ``slt-data`` is one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polymodal.errors import UserError
from polymodal.files import write_text
from polymodal.paths import read_text_lines

from slt.data.base import Item, collapse
from slt.data.jsonl import Migration, looks_misdecoded, read_rows
from slt.data.questions import MIGRATIONS as QUESTION_MIGRATIONS
from slt.data.questions import SCHEMA as QUESTION_SCHEMA
from slt.data.questions import SCHEMA_VERSION as QUESTION_VERSION

__all__ = ["SCHEMA", "SCHEMA_VERSION", "read_predictions", "read_references", "write_predictions"]

SCHEMA = "slt.predictions"
SCHEMA_VERSION = 1
MIGRATIONS: dict[int, Migration] = {}
KEYS = ("prediction", "hypothesis")


def read_predictions(path: Path, ids: Sequence[str], option: str = "--pred") -> dict[str, str]:
    """One translation for each clip of a split.

    Args:
        path: the file, see the module's text.
        ids: clips of the split in the order of the annotation.
        option: the option that named the file, for messages.

    Returns:
        Translation by id, in the order of ``ids``.

    Raises:
        UserError: unreadable file, no translation in a row, an id that is unknown or given twice, clips without a row,
            another number of text lines than clips.
    """
    if path.suffix.lower() not in (".jsonl", ".json"):
        return _text_lines(path, ids, option)
    wanted, found, lines = set(ids), {}, dict[str, int]()
    for number, row in read_rows(path, SCHEMA, SCHEMA_VERSION, MIGRATIONS, option=option):
        name = _text(path, number, row, "video_id")
        if name in lines:
            raise UserError(f"{path}:{number}: video_id {name!r} was already given on line {lines[name]}; keep one row")
        key = next((key for key in KEYS if key in row), None)
        if key is None:
            raise UserError(f"{path}:{number}: no translation; a row needs the key {' or '.join(KEYS)}")
        if name not in wanted:
            raise UserError(
                f"{path}:{number}: unknown video_id {name!r}: not among the {len(ids)} clips to score; check --data "
                "and --split, or remove the row"
            )
        found[name], lines[name] = collapse(_text(path, number, row, key, empty=True)), number
    missing = [name for name in ids if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{path}: no translation of {missing[0]!r}{more} ({len(missing)} of {len(ids)} clips); add rows, with an "
            "empty text where there is none"
        )
    return {name: found[name] for name in ids}


def read_references(path: Path, lowercase: bool = False) -> list[Item]:
    """Reference sentences and questions of a file, in its order.

    Raises:
        UserError: unreadable file, a key is missing, an empty sentence, an id given twice, no row.
    """
    items: dict[str, Item] = {}
    lines: dict[str, int] = {}
    for number, row in read_rows(path, QUESTION_SCHEMA, QUESTION_VERSION, QUESTION_MIGRATIONS, option="--reference"):
        name, sentence = _text(path, number, row, "video_id"), collapse(_text(path, number, row, "sentence"))
        if looks_misdecoded(sentence):
            raise UserError(f"{path}:{number}: sentence looks wrongly decoded (mixed encodings); write it in UTF-8")
        if name in items:
            raise UserError(f"{path}:{number}: video_id {name!r} was already given on line {lines[name]}; keep one row")
        question = collapse(_text(path, number, row, "question", empty=True)) if "question" in row else ""
        if lowercase:
            sentence, question = sentence.lower(), question.lower()
        items[name], lines[name] = Item(name, sentence, question), number
    if not items:
        raise UserError(f'{path}: no rows; one object a line is expected: {{"video_id", "sentence", "question"?}}')
    return list(items.values())


def write_predictions(path: Path, predictions: dict[str, str]) -> None:
    """Write translations by id in the form that :func:`read_predictions` reads."""
    rows = [
        json.dumps({"video_id": name, "prediction": text}, ensure_ascii=False) for name, text in predictions.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(rows) + "\n")


def _text_lines(path: Path, ids: Sequence[str], option: str) -> dict[str, str]:
    lines = read_text_lines(path, option)
    if len(lines) != len(ids):
        raise UserError(
            f"{path}: {len(lines)} lines for {len(ids)} clips; a text file has one line a clip in the order of the "
            "annotation (for JSON lines name it .jsonl)"
        )
    return {name: collapse(line) for name, line in zip(ids, lines, strict=True)}


def _text(path: Path, number: int, row: dict[str, Any], key: str, empty: bool = False) -> str:
    if key not in row:
        raise UserError(f"{path}:{number}: key {key!r} is missing")
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{path}:{number}: {key} must be text, got {json.dumps(value)}")
    if not empty and not value.strip():
        raise UserError(f"{path}:{number}: {key} is empty; fill it in or remove the row")
    return value
