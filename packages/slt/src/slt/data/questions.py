"""Question files: one JSONL per split, ``{"video_id", "question", "sentence"}`` plus optional lang, source, topic.

The first line may be a header ``{"schema": "slt.questions", "schema_version": 1}``; a file without one is version 1.
Every error names the file, the line and the remedy, because these files are written by hand, by scripts and by other
people's tools.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from polymodal.errors import UserError
from polymodal.files import write_text

from slt.data.jsonl import Migration, header, looks_misdecoded, read_rows

__all__ = ["SCHEMA", "SCHEMA_VERSION", "SOURCES", "Question"]
__all__ += ["match_questions", "normalise", "read_questions", "write_questions"]

SCHEMA = "slt.questions"
SCHEMA_VERSION = 1
SOURCES = ("human", "template", "llm", "gbt")
MIGRATIONS: dict[int, Migration] = {}
"""Version -> function that turns a row of that version into one of the next."""

_REQUIRED = ("video_id", "question", "sentence")
_OPTIONAL = ("lang", "source", "topic")
_CJK = "\u3000-\u303f\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
_CJK_BLANK = re.compile(rf"(?<=[{_CJK}])\s+|\s+(?=[{_CJK}])")


@dataclass(frozen=True)
class Question:
    """One row of a question file.

    Attributes:
        video_id: id of the clip, as in the annotation.
        question: the question the signer is answering; empty means that none is known.
        sentence: the spoken-language sentence, kept so that a row can be checked against the annotation.
        lang: language of the question, such as ``de``; empty if not given.
        source: one of ``human``, ``template``, ``llm``, ``gbt``; empty if not given.
        topic: free text; empty if not given.
        line: line in the file it came from, 0 if from elsewhere; not part of equality.
    """

    video_id: str
    question: str
    sentence: str
    lang: str = ""
    source: str = ""
    topic: str = ""
    line: int = field(default=0, compare=False)

    def row(self) -> dict[str, str]:
        """The JSON object of this question; optional keys only where they are set."""
        row = {name: getattr(self, name) for name in _REQUIRED}
        return row | {name: getattr(self, name) for name in _OPTIONAL if getattr(self, name)}


def normalise(text: str) -> str:
    """Case, whitespace and Unicode form taken out, for comparing a sentence with its annotation.

    Runs of blanks become one, blanks beside Chinese characters vanish (files segment Chinese differently), umlauts
    are composed (macOS tools write them decomposed).
    """
    return _CJK_BLANK.sub("", " ".join(unicodedata.normalize("NFC", text).split())).casefold()


def read_questions(path: Path, sentences: Mapping[str, str], *, allow_missing: bool = False) -> dict[str, Question]:
    """Read one split's question file and hold it against the annotation.

    Args:
        path: the JSONL file.
        sentences: sentence of every clip of the split, by id.
        allow_missing: give clips without a row an empty question instead of raising.

    Returns:
        One question per id of ``sentences``, in that order.

    Raises:
        UserError: unreadable file, bad UTF-8, bad JSON, missing or unknown keys, unknown or repeated ids, a sentence
            that differs from the annotation, clips without a question; with file, line and remedy.
    """
    rows = [
        _question(path, number, row)
        for number, row in read_rows(path, SCHEMA, SCHEMA_VERSION, MIGRATIONS, option="--data.questions")
    ]
    return match_questions(path, rows, sentences, allow_missing=allow_missing)


def match_questions(
    path: Path, rows: Iterable[Question], sentences: Mapping[str, str], *, allow_missing: bool = False
) -> dict[str, Question]:
    """Hold questions against the annotation of a split.

    Args:
        path: the file that they came from, for messages.
        rows: questions with their lines.
        sentences: sentence of every clip of the split, by id.
        allow_missing: give clips without a row an empty question instead of raising.

    Returns:
        One question per id of ``sentences``, in that order.

    Raises:
        UserError: unknown or repeated ids, a sentence that differs from the annotation, clips without a question.
    """
    found: dict[str, Question] = {}
    unknown: list[Question] = []
    for question in rows:
        earlier = found.get(question.video_id)
        if earlier is not None:
            raise UserError(
                f"{path}:{question.line}: video_id {question.video_id!r} was already given on line {earlier.line}; "
                f"keep one of the two rows"
            )
        found[question.video_id] = question
        if question.video_id not in sentences:
            unknown.append(question)
        elif normalise(question.sentence) != normalise(sentences[question.video_id]):
            raise UserError(
                f"{path}:{question.line}: sentence of {question.video_id!r} differs from the annotation "
                f"({_short(question.sentence)} against {_short(sentences[question.video_id])}); "
                f"correct the row or check that file and annotation are of one release"
            )
    if unknown:
        raise UserError(
            f"{path}:{unknown[0].line}: unknown video_id {unknown[0].video_id!r}{_more(unknown)}: not in the "
            f"annotation of this split ({len(sentences)} clips); remove the rows or check that file and split match"
        )
    missing = [name for name in sentences if name not in found]
    if missing and not allow_missing:
        raise UserError(
            f"{path}: no question for {missing[0]!r}{_more(missing)} ({len(missing)} of {len(sentences)} clips); add "
            f"the rows, or pass --data.allow_missing true to give those clips an empty question"
        )
    return {name: found.get(name) or Question(name, "", sentence) for name, sentence in sentences.items()}


def write_questions(path: Path, questions: Iterable[Question]) -> int:
    """Write a question file with its schema header, atomically.

    Args:
        path: the file; its folder is made.
        questions: rows, written in the given order.

    Returns:
        Number of rows written.

    Raises:
        UserError: two rows with one id, or an unknown source.
    """
    seen: set[str] = set()
    lines = [header(SCHEMA, SCHEMA_VERSION)]
    for question in questions:
        if question.video_id in seen:
            raise UserError(f"{path}: two questions for {question.video_id!r}; a file holds one a clip")
        if question.source and question.source not in SOURCES:
            raise UserError(f"source={question.source!r} of {question.video_id!r}; allowed are {', '.join(SOURCES)}")
        seen.add(question.video_id)
        lines.append(json.dumps(question.row(), ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")
    return len(seen)


def _question(path: Path, number: int, row: dict[str, Any]) -> Question:
    allowed = {f.name for f in fields(Question)} - {"line"}
    for key in _REQUIRED:
        if key not in row:
            raise UserError(f"{path}:{number}: key {key!r} is missing; a row needs {', '.join(_REQUIRED)}")
    for key, value in row.items():
        if key not in allowed:
            raise UserError(f"{path}:{number}: unknown key {key!r}; allowed are {', '.join(_REQUIRED + _OPTIONAL)}")
        if not isinstance(value, str):
            raise UserError(f"{path}:{number}: {key} must be text, got {json.dumps(value)}")
        if looks_misdecoded(value):
            raise UserError(
                f"{path}:{number}: {key} {_short(value)} looks wrongly decoded (mixed encodings); "
                f"decode the source as UTF-8 once and write it again"
            )
    if row.get("source", "") not in ("", *SOURCES):
        raise UserError(f"{path}:{number}: source {row['source']!r}; allowed are {', '.join(SOURCES)}")
    if not row["video_id"].strip():
        raise UserError(f"{path}:{number}: video_id is empty; give the id of the clip as in the annotation")
    return Question(**{name: value.strip() for name, value in row.items()}, line=number)


def _short(text: str, width: int = 40) -> str:
    return repr(text if len(text) <= width else text[: width - 1] + "…")


def _more(found: list[Any]) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""
