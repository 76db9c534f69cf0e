"""Question files: what is accepted, and that every error is one line with file, line and remedy."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from polymodal.errors import UserError
from slt.data import questions
from slt.data.jsonl import looks_misdecoded
from slt.data.questions import Question, normalise, read_questions, write_questions

SENTENCES = {"a": "morgen regnet es", "b": "am tag sonne", "c": "gute nacht"}
ROWS = [
    {"video_id": "a", "question": "was kommt ?", "sentence": "Morgen  regnet es"},
    {
        "video_id": "b",
        "question": "und dann ?",
        "sentence": "am tag sonne",
        "lang": "de",
        "source": "human",
        "topic": "t",
    },
    {"video_id": "c", "question": "", "sentence": "gute nacht"},
]


def write(path, rows, header=None):
    lines = ([header] if header else []) + [r if isinstance(r, str) else json.dumps(r) for r in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def fails(path, *parts, **options):
    with pytest.raises(UserError) as caught:
        read_questions(path, SENTENCES, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def test_reads_rows_in_the_order_of_the_annotation(tmp_path):
    path = write(tmp_path / "dev.jsonl", ROWS[::-1])
    found = read_questions(path, SENTENCES)
    assert list(found) == ["a", "b", "c"]
    assert found["b"] == Question("b", "und dann ?", "am tag sonne", lang="de", source="human", topic="t")
    assert [found[k].line for k in "abc"] == [3, 2, 1]
    assert found["c"].question == ""


def test_round_trip_with_header_and_crlf_and_bom(tmp_path):
    path = tmp_path / "sub" / "train.jsonl"
    rows = [Question("a", "grüße 你好", "morgen regnet es", lang="de", source="llm", topic="x")]
    assert write_questions(path, rows) == 1
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert json.loads(first) == {"schema": "slt.questions", "schema_version": 1}
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_questions(path, {"a": SENTENCES["a"]}) == {"a": rows[0]}
    assert [p.name for p in path.parent.iterdir()] == ["train.jsonl"]


def test_missing_videos_are_an_error_or_empty(tmp_path):
    path = write(tmp_path / "q.jsonl", ROWS[:1])
    fails(path, "q.jsonl", "'b' and 1 more", "2 of 3", "allow_missing")
    found = read_questions(path, SENTENCES, allow_missing=True)
    assert [found[k].question for k in "abc"] == ["was kommt ?", "", ""]
    assert found["c"].sentence == "gute nacht"


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ("{broken", ("q.jsonl:2:", "not a JSON object", "one object a line")),
        ("[1]", ("q.jsonl:2:", "list")),
        ({"video_id": "a", "question": "x", "sentence": "am tag sonne"}, ("q.jsonl:2:", "already given on line 1")),
        ({"video_id": "b", "question": "x", "sentence": "am tag regen"}, ("q.jsonl:2:", "differs", "am tag regen")),
        ({"video_id": "zz", "question": "x", "sentence": "s"}, ("q.jsonl:2:", "unknown video_id 'zz'", "3 clips")),
        ({"video_id": "b", "question": "x"}, ("q.jsonl:2:", "'sentence' is missing")),
        ({"video_id": "b", "question": "x", "sentence": "s", "qestion": ""}, ("q.jsonl:2:", "'qestion'", "allowed")),
        ({"video_id": "b", "question": None, "sentence": "s"}, ("q.jsonl:2:", "question must be text", "null")),
        ({"video_id": " ", "question": "x", "sentence": "s"}, ("q.jsonl:2:", "video_id is empty")),
        ({"video_id": "b", "question": "x", "sentence": "s", "source": "gpt"}, ("q.jsonl:2:", "'gpt'", "template")),
        ({"video_id": "b", "question": "schÃ¶n", "sentence": "s"}, ("q.jsonl:2:", "wrongly decoded")),
        ({"video_id": "b", "question": "sch\ufffdn", "sentence": "s"}, ("q.jsonl:2:", "wrongly decoded")),
    ],
)
def test_bad_rows_name_file_line_and_remedy(tmp_path, row, parts):
    fails(write(tmp_path / "q.jsonl", [ROWS[0], row]), *parts, allow_missing=True)


def test_bad_encodings_name_the_line(tmp_path):
    path = tmp_path / "q.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(good + b"\n" + '{"video_id": "b", "question": "schön", "sentence": "s"}'.encode("latin-1"))
    fails(path, "q.jsonl:2:", "0xf6", "not UTF-8", "iconv")
    path.write_bytes(json.dumps(ROWS[0]).encode("utf-16"))
    fails(path, "UTF-16", "iconv")


def test_missing_file(tmp_path):
    fails(tmp_path / "none.jsonl", "none.jsonl", "No such file", "--data.questions")


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ('{"schema": "slt.questions", "schema_version": 2}', "newer"),
        ('{"schema": "slt.questions", "schema_version": 0}', "is not"),
        ('{"schema": "slt.questions", "schema_version": true}', "is not"),
        ('{"schema": "other", "schema_version": 1}', "is not"),
    ],
)
def test_headers_that_are_refused(tmp_path, header, part):
    fails(write(tmp_path / "q.jsonl", ROWS, header), "q.jsonl:1:", part)


def test_older_versions_are_migrated(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "SCHEMA_VERSION", 2)
    monkeypatch.setattr(questions, "MIGRATIONS", {1: lambda row: {**row, "topic": "migrated"}})
    found = read_questions(write(tmp_path / "q.jsonl", ROWS), SENTENCES)
    assert {q.topic for q in found.values()} == {"migrated"}
    header = '{"schema": "slt.questions", "schema_version": 2}'
    found = read_questions(write(tmp_path / "q.jsonl", ROWS, header), SENTENCES)
    assert found["b"].topic == "t"


def test_write_refuses_duplicates_and_sources(tmp_path):
    with pytest.raises(UserError, match="two questions for 'a'"):
        write_questions(tmp_path / "q.jsonl", [Question("a", "", "s"), Question("a", "x", "s")])
    with pytest.raises(UserError, match="allowed are human"):
        write_questions(tmp_path / "q.jsonl", [Question("a", "", "s", source="web")])
    assert not list(tmp_path.iterdir())


def test_normalise_takes_out_case_blanks_and_unicode_form():
    assert normalise("  SCHo\u0308n \t ist  es ") == normalise("schön ist es")
    assert normalise("我 们 去") == normalise("我们去")
    assert normalise("a b") != normalise("ab")


@pytest.mark.parametrize(
    "text", ["schÃ¶n", "was fÃ¼r ein Tag â€“ heute ?", "ä½\xa0å¥½", "cafÃ©", "ov\x8de", "a\ufffdb"]
)
def test_wrongly_decoded_texts_are_seen(text):
    assert looks_misdecoded(text)


@pytest.mark.parametrize(
    "text", ["schön", "un CAFÉ»", "»Ä«", "naïve Übung, ß", "你好吗？", "Où va-t-il à\xa0?", "don’t"]
)
def test_odd_but_right_texts_pass(text):
    assert not looks_misdecoded(text)


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"], min_codepoint=32, max_codepoint=0x24F)),
        max_size=5,
    )
)
def test_any_text_survives_a_round_trip(tmp_path_factory, texts):
    texts = [" ".join(t.split()) for t in texts if not looks_misdecoded(t)]
    path = tmp_path_factory.mktemp("q") / "q.jsonl"
    rows = [Question(f"v{n}", text, "satz") for n, text in enumerate(texts)]
    write_questions(path, rows)
    assert list(read_questions(path, {q.video_id: "satz" for q in rows}).values()) == rows
