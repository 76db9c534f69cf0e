"""Files of translations and references: what is accepted, and what each complaint says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from polymodal.errors import UserError
from slt.data.base import Item
from slt.data.questions import Question, write_questions
from slt.predictions import read_predictions, read_references, write_predictions

IDS = ["a", "b", "c"]


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def test_rows_in_any_order_both_keys_and_foreign_keys(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "p.jsonl",
        {"schema": "slt.predictions", "schema_version": 1},
        {"video_id": "c", "prediction": "  drei   wörter  hier"},
        "",
        {"video_id": "a", "hypothesis": "eins", "score": 0.3, "reference": "x"},
        {"video_id": "b", "prediction": "", "hypothesis": "not this one"},
    )
    assert read_predictions(path, IDS) == {"a": "eins", "b": "", "c": "drei wörter hier"}
    assert list(read_predictions(path, IDS)) == IDS


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    found = {"b": "zwei", "a": "", "c": "süß 雪"}
    write_predictions(tmp_path / "new" / "p.jsonl", found)
    assert read_predictions(tmp_path / "new" / "p.jsonl", IDS) == found


def test_text_has_one_line_a_clip_in_order(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("eins\r\n\r\ndrei wörter\r\n".encode())
    assert read_predictions(path, IDS) == {"a": "eins", "b": "", "c": "drei wörter"}
    path.write_text("eins\nzwei\n\n")
    assert read_predictions(path, IDS) == {"a": "eins", "b": "zwei", "c": ""}
    path.write_text("eins\nzwei\n")
    with pytest.raises(UserError, match=r"p\.txt: 2 lines for 3 clips; .* order of the annotation"):
        read_predictions(path, IDS)
    path.write_bytes(b"eins\nzw\xf6lf\ndrei\n")
    with pytest.raises(UserError, match=r"p\.txt, line 2: byte 0xf6 is not utf-8"):
        read_predictions(path, IDS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"video_id": "a", "prediction": "x"}, {"video_id": "z", "prediction": "x"}], r":2: unknown video_id 'z'"),
        ([{"video_id": "a", "prediction": "x"}], r"no translation of 'b' and 1 more \(2 of 3 clips\)"),
        ([{"video_id": "a", "prediction": "x"}, {"video_id": "a", "prediction": "x"}], r":2: .*'a'.* on line 1"),
        ([{"video_id": "a", "translation": "x"}], r":1: no translation; .* prediction or hypothesis"),
        ([{"prediction": "x"}], r":1: key 'video_id' is missing"),
        ([{"video_id": "a", "prediction": None}], r":1: prediction must be text, got null"),
        ([{"video_id": " ", "prediction": "x"}], r":1: video_id is empty"),
        (["{'video_id': 'a'}"], r":1: not a JSON object"),
        ([["a", "x"]], r":1: expected an object"),
        ([{"schema": "slt.questions", "schema_version": 1}], r":1: header .* is not"),
    ],
)
def test_complaints_have_file_line_and_cause(tmp_path: Path, rows: list[object], message: str) -> None:
    path = lines(tmp_path / "p.jsonl", *rows)
    with pytest.raises(UserError, match=message) as error:
        read_predictions(path, IDS)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    for name in ("no.jsonl", "no.txt"):
        with pytest.raises(UserError, match=name):
            read_predictions(tmp_path / name, IDS)
    with pytest.raises(UserError, match="--question_only"):
        read_predictions(tmp_path / "no.jsonl", IDS, option="--question_only")


def test_references_keep_order_and_options(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "r.jsonl",
        {"video_id": "b", "sentence": "Am  Montag", "question": "Wann ?"},
        {"video_id": "a", "sentence": "Schnee", "lang": "de"},
    )
    assert read_references(path) == [Item("b", "Am Montag", "Wann ?"), Item("a", "Schnee")]
    assert read_references(path, lowercase=True) == [Item("b", "am montag", "wann ?"), Item("a", "schnee")]


def test_a_question_file_is_a_reference_file(tmp_path: Path) -> None:
    write_questions(tmp_path / "test.jsonl", [Question("a", "wann ?", "heute", source="human")])
    assert read_references(tmp_path / "test.jsonl") == [Item("a", "heute", "wann ?")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"video_id": "a", "sentence": "x"}, {"video_id": "a", "sentence": "y"}], r":2: .*'a'.* on line 1"),
        ([{"video_id": "a"}], r":1: key 'sentence' is missing"),
        ([{"video_id": "a", "sentence": "  "}], r":1: sentence is empty"),
        ([{"video_id": "a", "sentence": "SÃ¼den"}], r":1: sentence looks wrongly decoded"),
        ([{"video_id": "a", "sentence": "x", "question": 3}], r":1: question must be text, got 3"),
        ([], r"no rows"),
    ],
)
def test_bad_references(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_references(lines(tmp_path / "r.jsonl", *rows))
