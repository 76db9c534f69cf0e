"""The predecessor's two file formats, and template questions."""

import pytest
from polymodal.errors import UserError
from slt.data.gbt import convert
from slt.data.leak import content_tokens, leak_report
from slt.data.questions import Question
from slt.data.templates import PROMPT, TOPICS, build_template_questions, template_question, topic_of

PHOENIX = """dev/11August_2010_Wednesday_tagesschau-2 ja guten abend%wie beginnt es ?%GUT ABEND
dev/clip-2 morgen regnet es%%MORGEN REGEN
"""
CSL = """S000007_P0003_T00|S000007_P0003_T00|120|我 书|我 的 书 。|我 的书 。|书 在 哪？
2|S000008_P0003_T00|80|你|你 好|你好||
3|S000009_P0003_T00|80|他|他 来|他 来|谁来了？|
"""


def test_phoenix_lines(tmp_path):
    path = tmp_path / "phoenix.dev"
    path.write_text(PHOENIX, encoding="utf-8")
    found = convert(path)
    assert found == [
        Question("11August_2010_Wednesday_tagesschau-2", "wie beginnt es ?", "ja guten abend", "de", "gbt"),
        Question("clip-2", "", "morgen regnet es", "de", "gbt"),
    ]
    assert [q.line for q in found] == [1, 2]


def test_csl_lines_with_seven_and_eight_fields(tmp_path):
    path = tmp_path / "csl.dev"
    path.write_text("id|name|length|gloss|char|word|question\n" + CSL, encoding="utf-8")
    found = convert(path)
    assert [(q.video_id, q.question, q.sentence) for q in found] == [
        ("S000007_P0003_T00", "书在哪？", "我的书。"),
        ("S000008_P0003_T00", "", "你好"),
        ("S000009_P0003_T00", "谁来了？", "他来"),
    ]
    assert {(q.lang, q.source) for q in found} == {("zh", "gbt")}
    assert [q.line for q in found] == [2, 3, 4]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dev/a b%c%D\ndev/a b%c%D\n", (":2:", "already given on line 1")),
        ("dev/a b%c%D\nno slash%c%D\n", (":2:", "<split>/<video>")),
        ("dev/a b%c%D\ndev/b b%c\n", (":2:", "%<question>%")),
        ("1|n|3|g|c|w|q\n2|m|3|g|c|w\n", (":2:", "7 fields")),
        ("1|n|3|g|c|w|q|extra\n", (":1:", "7 fields")),
        ("", ("empty",)),
    ],
)
def test_bad_files_name_the_line(tmp_path, text, parts):
    path = tmp_path / "q.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        convert(path)
    for part in parts:
        assert part in str(caught.value)


def test_layout_can_be_named_and_is_checked(tmp_path):
    path = tmp_path / "q.txt"
    path.write_text(PHOENIX, encoding="utf-8")
    assert len(convert(path, "phoenix")) == 2
    with pytest.raises(UserError, match="layout='x'"):
        convert(path, "x")
    with pytest.raises(UserError, match="7 fields"):
        convert(path, "csl")


@pytest.mark.parametrize("language", sorted(TOPICS))
def test_templates_share_no_content_with_their_sentence(language):
    stems = [stem for topic in TOPICS[language] for stem in topic.stems]
    words = [w for topic in TOPICS[language] for q in topic.questions for w in content_tokens(q, language)]
    pairs = [f"{a} {b}" for a, b in zip(stems, words, strict=False)]
    sentences = {f"{i}": s for i, s in enumerate([*stems, *words, *pairs])}
    rows = build_template_questions(sentences, language)
    asked = [q for q in rows if q.question]
    assert len(asked) > 0.9 * len(rows)
    for q in asked:
        assert not content_tokens(q.question, language) & content_tokens(q.sentence, language)
    assert leak_report("x", rows, language).rejected == ()


def test_topics_are_found_and_questions_are_deterministic():
    assert topic_of("im norden regen und schauer bei wind", "de_DE").name == "rain"
    assert topic_of("hallo welt nichts bekanntes", "de").name == "greeting"
    assert topic_of("xyz", "de").name == "general"
    assert topic_of("我今天去医院", "zh").name == "health"
    first = template_question("morgen kommt wind", "de", "clip-1")
    assert first == template_question("morgen kommt wind", "de", "clip-1")
    assert first[1] == "wind"
    texts = {template_question("morgen kommt wind", "de", f"clip-{i}")[0] for i in range(20)}
    assert len(texts) == 2
    with pytest.raises(UserError, match="no template table"):
        topic_of("x", "fr")


def test_the_prompt_names_what_it_needs():
    text = PROMPT.format(language="German", sentence="morgen regnet es")
    assert "morgen regnet es" in text
    assert text.count("German") == 2
