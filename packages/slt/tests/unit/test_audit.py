import json
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from slt.audit import COLUMNS, Overlap, audit_report, overlap_rate
from slt.metrics import bleu, scores, signatures


@dataclass(frozen=True)
class Pair:
    question: str
    sentence: str


REFERENCES = ["morgen regen im norden", "am montag scheint die sonne", "morgen regen im norden"]
QUESTIONS = ["wie wird es morgen im norden ?", "was scheint am montag ?", "wo regen ?"]
TRAIN = [Pair("wie wird es morgen ?", "morgen schnee im norden"), Pair("was scheint am montag ?", "die sonne scheint")]
RIGHT = list(REFERENCES)
WRONG = ["x", "y", "z"]


class TestOverlap:
    def test_share_of_the_sentence(self):
        # 3 of 4, 3 of 5, 1 of 4
        assert overlap_rate(QUESTIONS, REFERENCES).rate == pytest.approx((3 / 4 + 3 / 5 + 1 / 4) / 3)

    def test_repeated_words_count_each_time(self):
        assert overlap_rate(["a"], ["a a b"]).rate == pytest.approx(2 / 3)

    def test_characters(self):
        assert overlap_rate(["你好吗？"], ["你 很好"], "char").rate == pytest.approx(2 / 3)

    @pytest.mark.parametrize(
        ("question", "sentence", "equal"),
        [
            ("morgen regen ?", "morgen  regen", 1),
            ("morgen regen?", "morgen regen", 1),
            ("morgen regen ?? ", "morgen regen ", 1),
            ("morgen regen ?", "morgen regen ?", 1),
            ("morgen regen", "morgen regen ?", 1),
            ("morgen ? regen", "morgen regen", 0),
            ("morgen regen ?", "morgen regen .", 0),
            ("?", "", 0),
            ("", "", 0),
        ],
    )
    def test_equal_up_to_the_question_mark(self, question, sentence, equal):
        assert overlap_rate([question], [sentence]).equal == equal

    def test_equal_in_chinese(self):
        assert overlap_rate(["你喜欢茶吗？"], ["你 喜欢茶吗"], "char") == Overlap(1.0, 1, 1)

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.tuples(st.text("ab ?", max_size=6), st.text("abc ", max_size=6)), min_size=1, max_size=6))
    def test_bounds(self, pairs):
        questions, sentences = map(list, zip(*pairs, strict=True))
        found = overlap_rate(questions, sentences)
        assert 0 <= found.rate <= 1
        assert 0 <= found.equal <= found.items == len(pairs)
        assert overlap_rate([""] * len(pairs), sentences).rate == 0
        assert overlap_rate(sentences, sentences).rate == sum(bool(s.split()) for s in sentences) / len(pairs)

    def test_bad_input(self):
        with pytest.raises(UserError, match="1 questions with 2 sentences"):
            overlap_rate(["a"], ["a", "b"])
        with pytest.raises(UserError, match="no item"):
            overlap_rate([], [])
        with pytest.raises(UserError, match="'letters'"):
            overlap_rate(["a"], ["a"], "letters")


class TestReport:
    report = audit_report(
        REFERENCES, QUESTIONS, {"ssaw": RIGHT, "question_only": WRONG}, TRAIN, lowercase=True, append_period=True
    )

    def test_rows_in_order_with_every_score(self):
        assert [row.name for row in self.report.rows] == ["ssaw", "question_only", "copy_question", "question_1nn"]
        assert self.report.model == "ssaw"
        for row in self.report.rows:
            assert row.scores.keys() >= COLUMNS.keys()
        assert self.report.row("ssaw").scores == scores(REFERENCES, RIGHT)
        assert self.report.row("copy_question").scores == scores(REFERENCES, QUESTIONS)
        nearest = [TRAIN[0].sentence, TRAIN[1].sentence, TRAIN[0].sentence]
        assert self.report.row("question_1nn").scores == scores(REFERENCES, nearest)
        with pytest.raises(KeyError):
            self.report.row("nothing")

    def test_overlap_signatures_and_counts(self):
        assert self.report.overlap == overlap_rate(QUESTIONS, REFERENCES)
        assert self.report.unique_sentences == 2
        assert self.report.signatures == signatures("word", True, True)

    def test_dict_is_plain_and_complete(self):
        data = json.loads(json.dumps(self.report.to_dict()))
        assert data["rows"][0] == {"name": "ssaw", "scores": scores(REFERENCES, RIGHT)}
        assert data["overlap"] == {"rate": self.report.overlap.rate, "equal": 0, "items": 3}
        assert data["verdict"] == self.report.verdict
        assert data["signatures"]["bleu4"].startswith("BLEU|")

    def test_markdown(self):
        lines = self.report.to_markdown().splitlines()
        assert lines[0].split(" | ")[1:] == [*list(COLUMNS.values())[:-1], "BLEU-4 unique |"]
        assert lines[1].count("---") == 1 + len(COLUMNS)
        assert lines[2].startswith("| ssaw | 100.00 |")
        assert all(line.count("|") == len(COLUMNS) + 2 for line in lines[:6])
        text = "\n".join(lines)
        assert f"**{self.report.verdict}**" in text
        assert f"- BLEU-1..4: `{self.report.signatures['bleu1']}`" in text
        assert f"- ROUGE-L slrt: `{self.report.signatures['rouge_l_slrt']}`" in text
        assert "3 items, 2 different sentences; on average 53.3 % of a sentence's words" in text

    def test_text_is_aligned(self):
        lines = self.report.to_text().splitlines()
        assert len({len(line) for line in lines[:5]}) == 1
        assert lines[1].split()[:2] == ["ssaw", "100.00"]
        assert self.report.verdict in lines
        assert any(line.startswith("chrF: chrF|") for line in lines)


class TestVerdict:
    def test_above_all(self):
        verdict = audit_report(REFERENCES, QUESTIONS, {"ssaw": RIGHT, "question_only": WRONG}, TRAIN).verdict
        best = max(bleu(REFERENCES, QUESTIONS)[3], bleu(REFERENCES, [TRAIN[i].sentence for i in (0, 1, 0)])[3])
        assert verdict.startswith(f"the model is {100 - best:.2f} BLEU-4 above the best translation without video")

    def test_not_above_copying(self):
        verdict = audit_report(REFERENCES, RIGHT, {"ssaw": RIGHT}, TRAIN).verdict
        assert verdict.startswith(
            "the model does not beat copying the question: this score says nothing about signing (BLEU-4 100.00"
        )

    def test_zero_does_not_beat_zero(self):
        verdict = audit_report(REFERENCES, ["a ?"] * 3, {"ssaw": WRONG}).verdict
        assert "does not beat copying" in verdict

    def test_not_above_the_nearest_question(self):
        train = [Pair(q, s) for q, s in zip(QUESTIONS, REFERENCES, strict=True)]
        assert "nearest training question" in audit_report(REFERENCES, QUESTIONS, {"ssaw": RIGHT}, train).verdict

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("question_only", "sees the question only: this score says nothing about signing"),
            ("shuffled_question", "the question is not used"),
            ("empty_question", "as well without a question"),
        ],
    )
    def test_not_above_the_other_rows(self, name, words):
        assert words in audit_report(REFERENCES, QUESTIONS, {"ssaw": RIGHT, name: RIGHT}, TRAIN).verdict

    def test_the_audited_row_can_be_named(self):
        found = audit_report(REFERENCES, QUESTIONS, {"other": WRONG, "ssaw": RIGHT}, TRAIN, model="ssaw")
        assert found.model == "ssaw"
        assert "above the best" in found.verdict

    def test_the_trained_baseline_itself_can_be_audited(self):
        assert "above the best" in audit_report(REFERENCES, QUESTIONS, {"question_only": RIGHT}, TRAIN).verdict

    def test_no_questions(self):
        found = audit_report(REFERENCES, ["", " ", ""], {"none": RIGHT}, TRAIN)
        assert [row.name for row in found.rows] == ["none"]
        assert found.verdict == "BLEU-4 100.00; nothing without video to compare with"
        assert found.notes == ["No item has a question: copy_question and question_1nn do not apply."]
        assert found.notes[0] in found.to_text()
        assert found.notes[0] in found.to_markdown()


def test_notes_on_what_is_missing():
    assert audit_report(REFERENCES, QUESTIONS, {"a": RIGHT}).notes == [
        "question_1nn left out: no training items were given."
    ]
    assert audit_report(REFERENCES, ["", *QUESTIONS[1:]], {"a": RIGHT}, TRAIN).notes == [
        "1 of 3 items have no question."
    ]


def test_lowercase_reaches_every_text():
    upper = [text.upper() for text in REFERENCES]
    train = [Pair(p.question.title(), p.sentence.upper()) for p in TRAIN]
    found = audit_report(REFERENCES, [q.upper() for q in QUESTIONS], {"a": upper}, train, lowercase=True)
    plain = audit_report(REFERENCES, QUESTIONS, {"a": RIGHT}, TRAIN, lowercase=True)
    assert found == plain
    assert audit_report(REFERENCES, QUESTIONS, {"a": upper}, TRAIN).row("a").scores["bleu1"] == 0


def test_chinese_report():
    found = audit_report(["今天天气很好"], ["今天天气好吗？"], {"a": ["今天天气很好"]}, level="char")
    assert found.row("a").scores["bleu4"] == 100
    assert "of a sentence's characters stand" in found.to_text()
    assert "tok:char" in found.signatures["rouge_l"]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((REFERENCES, QUESTIONS, {}), {}, "no predictions to audit"),
        ((REFERENCES, QUESTIONS, {"a": RIGHT}), {"model": "b"}, "model='b' is not among the predictions: a"),
        ((REFERENCES, QUESTIONS, {"copy_question": RIGHT}), {}, "this row is computed from the questions"),
        ((REFERENCES, QUESTIONS, {"a": RIGHT[:2]}), {}, "'a' has 2 sentences for 3 references"),
        ((REFERENCES, QUESTIONS[:2], {"a": RIGHT}), {}, "2 questions with 3 sentences"),
        ((REFERENCES, QUESTIONS, {"a": RIGHT}), {"level": "words"}, "'words'"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(UserError, match=message):
        audit_report(*arguments, **options)
