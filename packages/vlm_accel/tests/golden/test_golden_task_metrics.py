"""Task metrics against references of their own, worked figures, and their limits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vlm_accel.data.jsonl import Sample
from vlm_accel.metrics.choice import by_category, circular, mme, parse_letter, parse_yes_no
from vlm_accel.metrics.cider import cider
from vlm_accel.metrics.short import anls, exact, open_match, relaxed, vqa_accuracy
from vlm_accel.metrics.tasks import METRICS, TASKS, prompt_text, retained, score_tasks, task_info
from vlm_accel.metrics.text import edit_distance, number, vqa_form

_spec = importlib.util.spec_from_file_location("_metrics_reference", Path(__file__).parent / "_metrics_reference.py")
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

WORDS = ("a", "cat", "sits", "on", "mat", "dog", "runs", "far")


@settings(deadline=None, max_examples=60)
@given(st.text("abc ", max_size=9), st.text("abc ", max_size=9))
def test_edit_distance_is_the_recursive_one(a: str, b: str) -> None:
    assert edit_distance(a, b) == reference.distance(a, b)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("Kitten  ", ["mitten", "kitten"], 1.0),
        ("abcd", ["wxyz"], 0.0),
        ("ab", ["abcd"], 0.5),  # at the threshold: counts
        ("a", ["abcd"], 0.0),  # below: does not
        ("", ["x"], 0.0),
    ],
)
def test_anls(prediction: str, answers: list[str], score: float) -> None:
    assert anls(prediction, answers) == pytest.approx(score, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(["red", "blue", "green"]), min_size=10, max_size=10))
def test_vqa_accuracy_leaves_each_answer_out(answers: list[str]) -> None:
    assert vqa_accuracy("Red.", answers) == pytest.approx(reference.vqa("red", answers), abs=1e-12)


def test_vqa_accuracy_by_hand() -> None:
    assert vqa_accuracy("two", ["2"] * 2 + ["3"] * 8) == pytest.approx((2 * (1 / 3) + 8 * (2 / 3)) / 10)
    assert vqa_accuracy("the dog!", ["dog"] * 10) == 1.0
    assert vqa_accuracy("x", ["x"]) == 1.0
    assert vqa_form("It is 1,200.5, the end.") == "it is 1,200.5 end"


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("105", "100", 1.0),
        ("105.1", "100", 0.0),
        ("95", "100", 1.0),
        ("12%", "0.12", 1.0),
        ("12", "12%", 0.0),
        ("0", "0", 1.0),
        ("0.01", "0", 0.0),
        ("Yes.", "yes", 1.0),
        ("1,000", "1000", 1.0),
        ("-9.6", "-10", 1.0),
    ],
)
def test_relaxed(prediction: str, answer: str, score: float) -> None:
    assert relaxed(prediction, [answer]) == score


def test_numbers() -> None:
    assert (number("$1,200"), number("7 %"), number("nan"), number("inf"), number("b")) == (
        1200,
        0.07,
        None,
        None,
        None,
    )


def test_exact_and_open_answers() -> None:
    assert exact(" Left. ", ["left"]) == 1.0
    assert exact("left side", ["left"]) == 0.0
    assert open_match("The result is 3.14", ["3.141"]) == 1.0
    assert open_match("it is a red fox indeed", ["red fox"]) == 1.0
    assert open_match("the redfox", ["red fox"]) == 0.0
    assert open_match("12", ["13"]) == 0.0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("D. a cow", "D"),
        ("The answer is C.", "C"),
        ("answer: (B)", "B"),
        ("I think it is (D) here", "D"),
        ("it shows a dog", "B"),
        ("A dog is there", "B"),  # an article is no letter
        ("cat or dog", None),
        ("nothing", None),
        ("E", None),  # there are four options
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert parse_letter(text, ["a cat", "a dog", "a pig", "a cow"]) == letter


def test_yes_and_no() -> None:
    assert [parse_yes_no(t) for t in ("Yes, it is", "no", "It is not; no", "yes or no", "maybe")] == [
        "yes", "no", "no", "yes", None,
    ]  # fmt: skip


def test_circular_mme_and_categories() -> None:
    assert circular([True, False, True, True], ["q1", "q1", "q2", "q2"]) == 0.5
    right = [True, True, True, False, True, True]
    scores = mme(right, ["count"] * 4 + ["Code_Reasoning"] * 2, ["1", "1", "2", "2", "3", "3"])
    assert scores == {"perception": 75 + 50, "cognition": 200, "total": 325}
    assert by_category([1, 0, 1, 1], ["a", "a", "a", "b"]) == (pytest.approx((2 / 3 + 1) / 2), {"a": 2 / 3, "b": 1})


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=7)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=2, max_size=4))
def test_cider_is_that_of_dense_vectors(pairs: list) -> None:
    found = cider([" ".join(p) for p, _ in pairs], [[" ".join(t) for t in r] for _, r in pairs])
    assert found == pytest.approx(reference.cider([p for p, _ in pairs], [r for _, r in pairs]), abs=1e-9)


def test_cider_limits() -> None:
    assert cider(["a cat sits here", "two dogs run fast"], [["a cat sits here"], ["two dogs run fast"]]) == (
        pytest.approx(10.0)
    )
    assert cider(["x y", "z w"], [["a b"], ["c d"]]) == 0.0


def sample(task: str, number: int, answers: list[str], **more: object) -> Sample:
    return Sample(task, str(number), "what ?", answers=tuple(answers), **more)


def test_scores_by_task_and_what_is_retained() -> None:
    samples = [
        sample("chartqa", 0, ["10"], category="human"),
        sample("chartqa", 1, ["10"], category="augmented"),
        sample("ai2d", 2, ["B"], options=("x", "y")),
        sample("mmvet", 3, ["long"]),
    ]
    metrics, rows = score_tasks(samples, ["10.4", "11", "B", "some text"])
    assert metrics == {
        "test/chartqa/accuracy": 0.5, "test/chartqa/accuracy_human": 1, "test/chartqa/accuracy_augmented": 0,
        "test/ai2d/accuracy": 1,
    }  # fmt: skip
    assert [row["score"] for row in rows] == [1, 0, 1, None]
    assert rows[3]["prediction"] == "some text"
    half = {**metrics, "test/chartqa/accuracy": 0.25}
    assert retained(half, metrics) == pytest.approx((50 + 100) / 2)
    assert retained({}, {}) is None
    assert retained({"test/accuracy": 0.4}, {"test/accuracy": 0.8, "test/accuracy_left": 0.1}) == pytest.approx(50)


def test_mmbench_takes_variants_and_mmmu_takes_both_kinds() -> None:
    turned = [sample("mmbench", n, ["A"], options=("x", "y"), extra={"group": "q"}) for n in range(2)]
    assert score_tasks(turned, ["A", "B"])[0] == {"test/mmbench/accuracy": 0.5, "test/mmbench/accuracy_circular": 0.0}
    mixed = [sample("mmmu", 0, ["y"], options=("x", "y")), sample("mmmu", 1, ["4"])]
    assert score_tasks(mixed, ["B", "about 4"])[0] == {"test/mmmu/accuracy": 1.0}
    stars = [
        sample("mmstar", n, ["A"], options=("x", "y"), category=c) for n, c in enumerate(["Math 1", "Math 1", "b"])
    ]
    assert score_tasks(stars, ["A", "B", "A"])[0]["test/mmstar/accuracy"] == pytest.approx(0.75)
    assert score_tasks([sample("realworldqa", 0, ["C"])], ["C."])[0] == {"test/realworldqa/accuracy": 1.0}


def test_mme_pairs_questions_by_picture() -> None:
    files = [Path("a.png"), Path("a.png"), Path("b.png"), Path("b.png")]
    samples = [sample("mme", n, ["Yes"], category="count", images=(file,)) for n, file in enumerate(files)]
    found = score_tasks(samples, ["yes", "Yes.", "no", "yes"])[0]
    assert found["test/mme/total"] == 75 + 50


def test_every_task_has_a_metric_and_a_main_value() -> None:
    for name, info in TASKS.items():
        assert info.metric in METRICS, name
        row = sample(name, 0, ["A"], options=("x", "y"), category="count")
        values = METRICS[info.metric]([row], ["A"])[0]
        assert info.main in values or info.metric == "judge", name
    assert task_info("Text-VQA").metric == "vqa"
    assert task_info("my_own").metric == "exact"
    assert task_info("my_own", "anls").main == "anls"


def test_prompts_have_options_and_the_tasks_tail_once() -> None:
    asked = prompt_text(sample("ai2d", 0, ["A"], options=("left", "right")))
    assert asked.splitlines()[:3] == ["what ?", "A. left", "B. right"]
    assert asked.count("letter") == 1
    assert prompt_text(sample("digits", 0, ["A"])) == "what ?"
    assert "single word or phrase" in prompt_text(sample("mmmu", 0, ["4"]))
