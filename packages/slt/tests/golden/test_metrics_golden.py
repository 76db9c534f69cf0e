"""BLEU, ROUGE-L and word accuracy against slow references, and the specification's own numbers."""

import importlib.util
import random
from pathlib import Path

import pytest
from slt.metrics import bleu, rouge_l, word_accuracy

_spec = importlib.util.spec_from_file_location("slt_reference", Path(__file__).with_name("_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

GERMAN = ["regen", "schnee", "im", "norden", "und", "süden", "heute", "?", "."]
CHINESE = [*"你我他是喜欢天气很好吗？，。", " "]


def corpus(seed, words, glue):
    """References and hypotheses that share stretches, with empty and blank-only texts among them."""
    rng = random.Random(seed)
    references, hypotheses = [], []
    for _ in range(rng.randint(1, 12)):
        reference_words = rng.choices(words, k=rng.randint(0, 9))
        hypothesis_words = [w if rng.random() < 0.75 else rng.choice(words) for w in reference_words]
        hypothesis_words = hypothesis_words[: rng.randint(0, 12)] + rng.choices(words, k=rng.randint(0, 2))
        references.append(glue.join(reference_words))
        hypotheses.append(glue.join(hypothesis_words))
    return references, hypotheses


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(("level", "words", "glue"), [("word", GERMAN, "  "), ("char", CHINESE, "")])
def test_bleu_and_rouge(seed, level, words, glue):
    references, hypotheses = corpus(seed, words, glue)
    assert bleu(references, hypotheses, level) == pytest.approx(reference.bleu(references, hypotheses, level), abs=1e-9)
    for variant in ("coco", "slrt"):
        expected = reference.rouge_l(references, hypotheses, level, variant)
        assert rouge_l(references, hypotheses, level, variant) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_word_accuracy(seed):
    references, hypotheses = corpus(seed, GERMAN, " ")
    assert word_accuracy(references, hypotheses) == pytest.approx(reference.word_accuracy(references, hypotheses))


def test_bleu_of_the_specification():
    assert bleu(["a b c d e"], ["a b x y z"]) == pytest.approx([40.0, 31.622776601683793, 0, 0], abs=1e-9)


def test_rouge_by_hand():
    # LCS 2 of 4 and 3: P = 2/3, R = 1/2.
    p, r = 2 / 3, 1 / 2
    coco = (1 + 1.44) * p * r / (r + 1.44 * p)
    beta = p / r
    slrt = (1 + beta**2) * p * r / (r + beta**2 * p)
    assert rouge_l(["a b c d"], ["a x c"], "word", "coco") == pytest.approx(100 * coco, abs=1e-9)
    assert rouge_l(["a b c d"], ["a x c"], "word", "slrt") == pytest.approx(100 * slrt, abs=1e-9)
