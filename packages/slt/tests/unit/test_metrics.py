"""The edge cases of the metrics one by one, agreement with sacrebleu, and what signatures say."""

import logging
import random

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from slt.metrics import (
    bleu,
    bleu_signature,
    chrf,
    chrf_signature,
    rouge_l,
    rouge_signature,
    scores,
    signatures,
    unique_sentence_scores,
    word_accuracy,
    word_accuracy_signature,
)

words = st.lists(st.sampled_from(["regen", "schnee", "im", "norden", "und", "?", "."]), max_size=10).map(" ".join)
chinese = st.text(alphabet="你我他是喜欢天气很好吗？，。", max_size=10)


def pairs(texts):
    return st.lists(st.tuples(texts, texts), min_size=1, max_size=8)


def with_sacrebleu(references, hypotheses, tokenize):
    return [
        BLEU(tokenize=tokenize, smooth_method="none", effective_order=False, max_ngram_order=n, force=True)
        .corpus_score(hypotheses, [references])
        .score
        for n in (1, 2, 3, 4)
    ]


@settings(deadline=None, max_examples=150)
@given(pairs(words))
def test_bleu_is_sacrebleu_on_words(corpus):
    references, hypotheses = map(list, zip(*corpus, strict=True))
    assert bleu(references, hypotheses) == pytest.approx(with_sacrebleu(references, hypotheses, "none"), abs=1e-9)


@pytest.mark.parametrize("tokenize", ["zh", "char"])
@settings(deadline=None, max_examples=100)
@given(corpus=pairs(chinese))
def test_bleu_is_sacrebleu_on_chinese_characters(tokenize, corpus):
    references, hypotheses = map(list, zip(*corpus, strict=True))
    assert bleu(references, hypotheses, "char") == pytest.approx(
        with_sacrebleu(references, hypotheses, tokenize), abs=1e-9
    )


def test_bleu_is_sacrebleu_on_long_corpora():
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(30)]
    references = [" ".join(rng.choices(vocabulary, k=rng.randint(5, 25))) for _ in range(300)]
    hypotheses = [" ".join(w if rng.random() < 0.8 else rng.choice(vocabulary) for w in r.split()) for r in references]
    found = bleu(references, hypotheses)
    assert found == pytest.approx(with_sacrebleu(references, hypotheses, "none"), abs=1e-9)
    assert 20 < found[3] < found[0] < 100


@settings(deadline=None, max_examples=60)
@given(pairs(words))
def test_the_order_of_sentences_does_not_matter(corpus):
    references, hypotheses = map(list, zip(*corpus, strict=True))
    turned = (references[::-1], hypotheses[::-1])
    assert bleu(*turned) == pytest.approx(bleu(references, hypotheses))
    for variant in ("coco", "slrt"):
        assert rouge_l(*turned, "word", variant) == pytest.approx(rouge_l(references, hypotheses, "word", variant))
    assert chrf(*turned) == pytest.approx(chrf(references, hypotheses))
    assert word_accuracy(*turned) == pytest.approx(word_accuracy(references, hypotheses))


@settings(deadline=None, max_examples=60)
@given(pairs(words))
def test_all_scores_stay_in_range(corpus):
    references, hypotheses = map(list, zip(*corpus, strict=True))
    found = scores(references, hypotheses)
    assert all(0 <= value <= (1 if name == "word_accuracy" else 100 + 1e-9) for name, value in found.items())


class TestPerfect:
    def test_bleu_of_a_text_with_itself_is_exactly_100(self):
        assert bleu(["a b c d", "e"], ["a b c d", "e"]) == [100.0] * 4
        assert bleu(["今天天气"], ["今天天气"], "char") == [100.0] * 4

    @settings(deadline=None, max_examples=40)
    @given(st.lists(words, min_size=1, max_size=6))
    def test_texts_without_four_words_have_no_higher_orders(self, texts):
        longest = max(len(text.split()) for text in texts)
        assert bleu(texts, texts) == [100.0 if longest >= n else 0.0 for n in (1, 2, 3, 4)]
        for variant in ("coco", "slrt"):
            assert rouge_l(texts, texts, "word", variant) == pytest.approx(100, abs=1e-9)

    def test_chrf_and_accuracy(self):
        assert chrf(["am montag regen"], ["am montag regen"]) == pytest.approx(100)
        assert word_accuracy(["am montag regen"], ["am montag regen"]) == 1


class TestBleuEdges:
    def test_no_match_of_one_order_zeroes_it_and_all_above(self):
        assert bleu(["a b c d e"], ["a b x y z"]) == pytest.approx([40.0, 31.6227766017, 0, 0])
        assert bleu(["a b c d"], ["d c b a"])[1:] == [0, 0, 0]

    def test_brevity_penalty(self):
        full = bleu(["a b c d e f g h"], ["a b c d"])
        assert full == pytest.approx([100 * 2.718281828459045 ** (1 - 8 / 4)] * 4)

    def test_no_penalty_at_equal_or_greater_length(self):
        assert bleu(["a b c d"], ["a b c d e"])[0] == pytest.approx(80)

    def test_the_penalty_is_of_the_corpus(self):
        assert bleu(["a b", "c d e f"], ["a b a b", "c d"])[0] == pytest.approx(100 * 4 / 6)

    def test_an_empty_corpus_output_is_zero(self):
        assert bleu(["a b"], [""]) == [0.0] * 4
        assert bleu([""], [""]) == [0.0] * 4

    def test_one_empty_output_among_others(self):
        assert bleu(["a b c d", "e"], ["a b c d", ""])[3] == pytest.approx(100 * 2.718281828459045 ** (1 - 5 / 4))

    def test_repeated_words_are_clipped(self):
        assert bleu(["the cat"], ["the the the the"])[0] == pytest.approx(25)

    def test_blanks_between_characters_do_not_count(self):
        assert bleu(["今天 天气好"], ["今 天天气好"], "char") == [100.0] * 4
        assert bleu(["今天天气好"], ["今天天气坏"], "word") == [0.0] * 4

    def test_full_width_marks_are_characters_of_their_own(self):
        assert bleu(["你好吗？"], ["你好吗?"], "char")[0] == pytest.approx(75)

    def test_case_is_kept(self):
        assert bleu(["Regen im Norden"], ["regen im norden"])[0] == pytest.approx(100 / 3)

    def test_many_sentences_with_a_period_log_nothing(self, caplog):
        with caplog.at_level(logging.WARNING):
            bleu(["a b ."] * 150, ["a b ."] * 150)
            unique_sentence_scores(["a b ."] * 150, ["a b ."] * 150)
        assert caplog.records == []


@pytest.mark.parametrize("variant", ["coco", "slrt"])
class TestRougeEdges:
    def test_empty_hypothesis(self, variant):
        assert rouge_l(["a b"], [""], "word", variant) == 0
        assert rouge_l(["你好"], [""], "char", variant) == 0

    def test_both_empty(self, variant):
        assert rouge_l([""], [""], "word", variant) == pytest.approx(100)
        assert rouge_l([" "], [""], "word", variant) == pytest.approx(100)
        assert rouge_l([""], [""], "char", variant) == pytest.approx(100)

    def test_empty_reference(self, variant):
        assert rouge_l([""], ["a"], "word", variant) == 0

    def test_no_common_word(self, variant):
        assert rouge_l(["a b"], ["c d"], "word", variant) == 0

    def test_mean_of_sentences(self, variant):
        assert rouge_l(["a b", "c d"], ["a b", "x y"], "word", variant) == pytest.approx(50)

    def test_runs_of_blanks_collapse_between_words(self, variant):
        assert rouge_l([" a   b"], ["a b "], "word", variant) == pytest.approx(100)

    def test_a_blank_between_characters_is_two_empty_tokens(self, variant):
        # reference: 4 tokens, two of them empty; hypothesis: 2 tokens; LCS 2.
        p, r = 1.0, 0.5
        beta = 1.2 if variant == "coco" else p / (r + 1e-12)
        expected = 100 * (1 + beta**2) * p * r / (r + beta**2 * p)
        assert rouge_l(["你 好"], ["你好"], "char", variant) == pytest.approx(expected, abs=1e-9)

    def test_an_empty_hypothesis_matches_an_empty_token(self, variant):
        assert rouge_l(["你 好"], [""], "char", variant) > 0

    def test_equal_precision_and_recall_give_that_value(self, variant):
        assert rouge_l(["a b c d"], ["a x c y"], "word", variant) == pytest.approx(50, abs=1e-9)


class TestWordAccuracy:
    def test_positions(self):
        assert word_accuracy(["a b c d"], ["a x c"]) == 0.5
        assert word_accuracy(["a b"], ["x a b"]) == 0
        assert word_accuracy(["a b"], ["a b c d e"]) == 1

    def test_over_the_corpus_not_the_sentences(self):
        assert word_accuracy(["a b c", "d"], ["a b c", "x"]) == 0.75

    def test_empty_texts(self):
        assert word_accuracy(["", "a"], ["x", "a"]) == 1
        assert word_accuracy([""], [""]) == 0

    def test_characters(self):
        assert word_accuracy(["你 好吗"], ["你好呀"], "char") == pytest.approx(2 / 3)


class TestUnique:
    def test_different_references_give_the_corpus_scores(self):
        references, hypotheses = ["a b c d e", "f g h i", "j k"], ["a b c d x", "f g h i", ""]
        found = unique_sentence_scores(references, hypotheses)
        assert found.sentences == 3
        assert found.bleu == pytest.approx(bleu(references, hypotheses), abs=1e-9)
        assert found.rouge_l_coco == pytest.approx(rouge_l(references, hypotheses))
        assert found.rouge_l_slrt == pytest.approx(rouge_l(references, hypotheses, "word", "slrt"))

    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.tuples(words, words), min_size=1, max_size=5, unique_by=lambda pair: tuple(pair[0].split())))
    def test_repeating_takes_changes_nothing(self, corpus):
        repeated = [pair for n, pair in enumerate(corpus, start=1) for _ in range(n)]
        once = unique_sentence_scores(*map(list, zip(*corpus, strict=True)))
        often = unique_sentence_scores(*map(list, zip(*repeated, strict=True)))
        assert often.sentences == once.sentences == len(corpus)
        assert often.bleu == pytest.approx(once.bleu)
        assert often.rouge_l_coco == pytest.approx(once.rouge_l_coco)

    def test_takes_are_averaged_not_picked(self):
        # The first sentence has a right and a wrong take: half its statistics match.
        references, hypotheses = ["a b c d", "a  b c d", "e f g h"], ["a b c d", "w x y z", "e f g h"]
        found = unique_sentence_scores(references, hypotheses)
        assert found.sentences == 2
        assert found.bleu == pytest.approx([75.0] * 4)
        assert found.rouge_l_coco == pytest.approx(75)
        assert unique_sentence_scores(references[::-1], hypotheses[::-1]).bleu == pytest.approx(found.bleu)
        assert bleu(references, hypotheses)[0] == pytest.approx(100 * 8 / 12)

    def test_characters_are_grouped_without_blanks(self):
        assert unique_sentence_scores(["你 好", "你好"], ["你好", "你好"], "char").sentences == 1


def test_chrf_is_sacrebleu():
    references, hypotheses = ["am montag regen", "im süden sonne"], ["am dienstag regen", "im norden sonne"]
    assert chrf(references, hypotheses) == CHRF().corpus_score(hypotheses, [references]).score
    assert chrf(["a"], [""]) == 0


def test_scores_gathers_all_by_name_and_each_has_a_signature():
    references, hypotheses = ["a b c d", "a b c d"], ["a b c d", "a b x d"]
    found = scores(references, hypotheses)
    assert [found[f"bleu{n}"] for n in (1, 2, 3, 4)] == bleu(references, hypotheses)
    assert found["rouge_l"] == rouge_l(references, hypotheses, "word", "coco")
    assert found["rouge_l_slrt"] == rouge_l(references, hypotheses, "word", "slrt")
    assert found["chrf"] == chrf(references, hypotheses)
    assert found["bleu4_unique"] == unique_sentence_scores(references, hypotheses).bleu[3]
    assert found["word_accuracy"] == word_accuracy(references, hypotheses)
    assert found.keys() == signatures().keys()


def test_signatures_say_everything_that_changes_a_score():
    version = sacrebleu.__version__
    assert bleu_signature("word", True) == (
        f"BLEU|nrefs:1|case:lc|period:as-is|eff:no|tok:word|smooth:none|sacrebleu:{version}"
    )
    assert rouge_signature("char", "slrt", append_period=True) == (
        "ROUGE-L|nrefs:1|case:mixed|period:added|tok:char|beta:P/R|variant:slrt|mean:sentence"
    )
    assert chrf_signature(lowercase=True) == (
        f"chrF|nrefs:1|case:lc|period:as-is|eff:yes|nc:6|nw:0|beta:2|space:no|sacrebleu:{version}"
    )
    assert word_accuracy_signature() == (
        "ACC|nrefs:1|case:mixed|period:as-is|tok:word|match:position|over:reference-length"
    )
    settings_ = [
        (level, low, period) for level in ("word", "char") for low in (True, False) for period in (True, False)
    ]
    for function in (bleu_signature, word_accuracy_signature):
        assert len({function(*setting) for setting in settings_}) == len(settings_)
    assert len({rouge_signature(s[0], v, *s[1:]) for s in settings_ for v in ("coco", "slrt")}) == 2 * len(settings_)
    assert bleu_signature(unique=True) != bleu_signature()


@pytest.mark.parametrize("function", [bleu, rouge_l, chrf, word_accuracy, unique_sentence_scores, scores])
class TestBadInput:
    def test_unequal_lengths(self, function):
        with pytest.raises(UserError, match="2 references with 1 hypotheses"):
            function(["a", "b"], ["a"])

    def test_nothing(self, function):
        with pytest.raises(UserError, match="no sentence to score"):
            function([], [])

    def test_one_string_for_a_list(self, function):
        with pytest.raises(UserError, match="references is one string"):
            function("ab", ["a", "b"])

    def test_missing_hypothesis(self, function):
        with pytest.raises(UserError, match=r"hypotheses\[1\] is NoneType"):
            function(["a", "b"], ["a", None])


@pytest.mark.parametrize("function", [bleu, rouge_l, word_accuracy, unique_sentence_scores, scores])
def test_unknown_level(function):
    with pytest.raises(UserError, match="'words'; known: word, char"):
        function(["a"], ["a"], "words")


def test_unknown_variant():
    with pytest.raises(UserError, match="'rouge'; known: coco, slrt"):
        rouge_l(["a"], ["a"], "word", "rouge")
