"""Samples of text files one by one: CSV without a header, a folder a class, lines, trees, posts. No torch."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from polymodal.errors import UserError
from polymodal.paths import natural_key, read_text_lines, require_dir, require_files

__all__ = ["Rows", "csv_rows", "folder_rows", "label_number", "line_rows", "majority", "read_json", "tree_rows"]

Rows = Iterator[tuple[int, str]]
"""Class number and text of each sample, in the order of the file."""

_MAX_FIELD = 1 << 24
_LEAF = re.compile(r"\(\d+ ([^()]+)\)")
_ROOT = re.compile(r"\(([0-4]) ")
_BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}"}


def csv_rows(path: Path, what: str, classes: int, columns: Sequence[str], remedy: str) -> Rows:
    r"""Rows of a CSV file: class 1..``classes``, then ``columns`` of text, which are joined with spaces.

    Quotes are doubled inside quoted cells and a line break is written as ``\n``, as in the files of Zhang et al. 2015.
    A first row whose class is no number is a header. The file is read as a stream.

    Raises:
        UserError: a missing or broken file, another number of columns, or another class.
    """
    require_files(path.parent, [path.name], what, remedy)
    csv.field_size_limit(_MAX_FIELD)
    number = 0
    with path.open(encoding="utf-8-sig", newline="") as handle:
        try:
            for number, row in enumerate(csv.reader(handle), start=1):
                if not row or (number == 1 and not row[0].strip().isdecimal()):
                    continue
                if len(row) != 1 + len(columns):
                    raise UserError(
                        f"{what}: {path}, row {number} has {len(row)} columns; expected {1 + len(columns)}: class,"
                        f" {', '.join(columns)}; {remedy}"
                    )
                if not row[0].strip().isdecimal() or not 1 <= int(row[0]) <= classes:
                    raise UserError(f"{what}: {path}, row {number}: class {row[0]!r}; expected 1..{classes}; {remedy}")
                yield int(row[0]) - 1, " ".join(cell.replace("\\n", " ").strip() for cell in row[1:]).strip()
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{what}: {path}, after row {number}: cannot be read as CSV ({error}); {remedy}") from error


def folder_rows(folder: Path, label: int, what: str, remedy: str, encoding: str = "utf-8") -> Rows:
    """Every file of a folder as one sample of class ``label``, in natural order of the names.

    Raises:
        UserError: no such folder, no files in it, or one in another encoding.
    """
    require_dir(folder, what, remedy)
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    if not files:
        raise UserError(f"{what}: {folder} has no files; {remedy}")
    for path in sorted(files, key=lambda path: natural_key(path.name)):
        try:
            yield label, path.read_bytes().decode(encoding)
        except UnicodeDecodeError as error:
            raise UserError(f"{what}: {path} is not {encoding}; {remedy}") from error


def line_rows(path: Path, what: str, labels: Sequence[str], remedy: str) -> Rows:
    """Lines ``text;label``.

    Raises:
        UserError: a missing file, or a line without one of the labels.
    """
    for number, line in enumerate(read_text_lines(path, what, remedy), start=1):
        if not line.strip():
            continue
        text, semicolon, label = line.rpartition(";")
        if not semicolon:
            raise UserError(f"{what}: {path}, line {number}: {line[:60]!r}; expected text;label; {remedy}")
        yield label_number(label.strip(), labels, path, number, what), text.strip()


def tree_rows(path: Path, what: str, remedy: str) -> Rows:
    """Lines ``(3 (2 (2 The) (2 Rock)) ...)``: the label of the whole sentence, and its words.

    Raises:
        UserError: a missing file, or a line that is no such tree.
    """
    for number, line in enumerate(read_text_lines(path, what, remedy), start=1):
        if not line.strip():
            continue
        root, leaves = _ROOT.match(line), _LEAF.findall(line)
        if root is None or not leaves or line.count("(") != line.count(")"):
            raise UserError(
                f"{what}: {path}, line {number}: {line[:60]!r}; expected a tree such as (3 (2 A) (4 film)); {remedy}"
            )
        words = (_BRACKETS.get(leaf, leaf.replace("\\/", "/").replace("\\*", "*")) for leaf in leaves)
        yield int(root[1]), " ".join(words)


def label_number(text: str, labels: Sequence[str], path: Path, row: int, what: str) -> int:
    """Number of a class from its name or its number.

    Raises:
        UserError: neither.
    """
    if text in labels:
        return labels.index(text)
    if text.isdecimal() and int(text) < len(labels):
        return int(text)
    raise UserError(
        f"{what}: {path}, row {row}: label {text!r}; expected 0..{len(labels) - 1} or {', '.join(labels[:8])}"
    )


def read_json(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        UserError: missing, broken, or something else.
    """
    require_files(path.parent, [path.name], what, remedy)
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{what}: {path} cannot be read as JSON ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"{what}: {path} holds no object; {remedy}")
    return found


def majority(labels: Sequence[str]) -> str:
    """The most frequent label; ``""`` where two are equally frequent."""
    counts = Counter(labels).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return ""
    return counts[0][0]
