"""Converter for the predecessor's question files (glq-1992/GBT-code), which we do not redistribute.

PHOENIX-2014T, one line a clip::

    <split>/<video> <sentence>%<question>%<GLOSS>

CSL-Daily, seven fields and an optional trailing ``|``::

    id|name|length|gloss|char|word|question

Questions may be empty. Whether the paper's data are these questions is unknown; they leak (see :mod:`slt.data.leak`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from polymodal.data import read_text_lines
from polymodal.errors import UserError

from slt.data.base import SPLITS, collapse
from slt.data.questions import Question

__all__ = ["convert", "parse_csl_line", "parse_phoenix_line"]


def convert(path: Path, layout: str | None = None) -> list[Question]:
    """Read one split's file of the predecessor.

    Args:
        path: the text file.
        layout: ``phoenix`` or ``csl``; None decides by the first line.

    Returns:
        Questions in file order, ``source="gbt"``, with the line they came from.

    Raises:
        UserError: unreadable file, bad UTF-8, a line of another form, an id that occurs twice.
    """
    text = read_text_lines(path, "predecessor's question file")
    lines = [(number, line) for number, line in enumerate(text, 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: the file is empty; expected lines as in slt.data.gbt")
    parsers: dict[str, Callable[[str], Question]] = {"phoenix": parse_phoenix_line, "csl": parse_csl_line}
    layout = layout or ("csl" if lines[0][1].count("|") >= 6 else "phoenix")
    if layout not in parsers:
        raise UserError(f"layout={layout!r}; expected phoenix or csl")
    if layout == "csl" and lines[0][1].split("|")[:2] == ["id", "name"]:
        lines = lines[1:]
    found: dict[str, Question] = {}
    for number, line in lines:
        try:
            question = parsers[layout](line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}; correct the line or choose --layout phoenix|csl") from None
        if question.video_id in found:
            earlier = found[question.video_id].line
            raise UserError(f"{path}:{number}: {question.video_id!r} was already given on line {earlier}; keep one")
        found[question.video_id] = replace(question, line=number)
    return list(found.values())


def parse_phoenix_line(line: str) -> Question:
    """``dev/11August... sentence%question%GLOSS`` as a question.

    Raises:
        ValueError: the line has another form.
    """
    head, blank, text = line.partition(" ")
    split, slash, video = head.partition("/")
    parts = text.split("%")
    if not blank or not slash or not video or split not in SPLITS or len(parts) != 3:
        raise ValueError(f"expected `<split>/<video> <sentence>%<question>%<GLOSS>`, got {line[:60]!r}")
    return Question(video, collapse(parts[1]), collapse(parts[0]), lang="de", source="gbt")


def parse_csl_line(line: str) -> Question:
    """``id|name|length|gloss|char|word|question`` with an optional trailing bar as a question.

    Raises:
        ValueError: not seven or eight fields, or an eighth that is not empty.
    """
    parts = [part.strip() for part in line.split("|")]
    if len(parts) not in (7, 8) or not parts[1] or (len(parts) == 8 and parts[7]):
        raise ValueError(
            f"expected `id|name|length|gloss|char|word|question` (7 fields, optional last |), got {line[:60]!r}"
        )
    return Question(parts[1], "".join(parts[6].split()), "".join(parts[4].split()), lang="zh", source="gbt")
