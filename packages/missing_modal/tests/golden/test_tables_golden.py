"""Missing tables, metrics and temperatures against slow references in plain Python."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from missing_modal.calibration import HIGHEST, LOWEST, fit_temperature
from missing_modal.metrics import auroc, f1_scores, report, score_samples, summarise
from missing_modal.official_tables import redraw_official
from missing_modal.tables import missing_table

_spec = importlib.util.spec_from_file_location("mm_tables", Path(__file__).with_name("_tables_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


STORED_BOTH = [2, 1, 0, 0, 2, 2, 1, 1, 1, 0, 0, 2]
STORED_ANY = [
    "audio+image",
    "audio+image+text",
    "audio+image+text",
    "audio+image+text",
    "audio",
    "text",
    "audio+text",
    "image+text",
    "audio+image",
    "image",
    "audio+image+text",
    "text",
]


def world(seed, task, count=40, classes=5):
    rng = np.random.default_rng(seed)
    classes = 2 if task == "binary" else classes
    logits = 2.0 * rng.normal(size=(count, classes))
    if task == "multilabel":
        return logits, (rng.random((count, classes)) < 0.3).astype(np.int64)
    return logits, rng.integers(0, classes, count)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 60), st.sampled_from(["text", "image", "both"]), st.floats(0, 1), st.integers(0, 2**40), st.randoms()
)
def test_table(count, kind, ratio, seed, draw):
    ids = [f"{number:x}-{number % 7}" for number in range(count)]
    draw.shuffle(ids)
    found = missing_table(ids, kind, ratio, seed, "mmimdb", "train")
    assert found == reference.table(ids, kind, ratio, seed, "mmimdb", "train")


def test_table_stays_the_same_over_versions():
    # Written down once (NumPy 2.4), so that a changed stream of the generator does not go unnoticed.
    ids = [f"row{number}" for number in range(12)]
    assert list(missing_table(ids, "both", 0.7, 3, "food101", "val").values()) == STORED_BOTH
    found = missing_table(ids, "any", 0.7, 3, "food101", "val", modalities=("image", "text", "audio"))
    assert ["+".join(sorted(pattern)) for pattern in found.values()] == STORED_ANY


@pytest.mark.parametrize(
    ("rows", "expected"), [(15_552, (4666, 5443, 5443)), (7_799, (2340, 2730, 2729))], ids=["train", "test"]
)
def test_published_counts(rows, expected):
    codes = list(missing_table(map(str, range(rows)), "both", 0.7, 0, "mmimdb", "train").values())
    assert tuple(codes.count(code) for code in (0, 1, 2)) == expected
    drawn = redraw_official(rows, "both", 0.7, 0)
    assert tuple(drawn.count(code) for code in (0, 1, 2)) == expected


@pytest.mark.parametrize("kind", ["text", "image", "both"])
@pytest.mark.parametrize("ratio", [0.0, 0.29, 0.7, 1.0])
def test_official_way_of_drawing(kind, ratio):
    assert redraw_official(100, kind, ratio, 5) == reference.official(100, kind, ratio, 5)


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
@pytest.mark.parametrize("seed", [0, 1])
def test_metrics(task, seed):
    logits, labels = world(seed, task)
    if task == "multilabel":
        labels[:, 2] = 0
        logits[:, 2] = -abs(logits[:, 2])  # never there, never said
        labels[3], logits[3] = 0, -1.0
    found = summarise(score_samples(logits, labels, task))
    expected = reference.metrics(logits.tolist(), labels.tolist(), task)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_metrics_by_pattern(task):
    logits, labels = world(7, task)
    masks = np.random.default_rng(1).integers(1, 4, len(logits))
    found = report(logits, labels, masks, task, prefix="val/")
    for mask, name in ((3, "complete"), (1, "image"), (2, "text")):
        part = reference.metrics(logits[masks == mask].tolist(), labels[masks == mask].tolist(), task)
        assert {k for k in found if k.endswith("/" + name)} == {f"val/{key}/{name}" for key in part}
        for key, value in part.items():
            assert found[f"val/{key}/{name}"] == pytest.approx(value, abs=1e-12)
    for key, value in reference.metrics(logits.tolist(), labels.tolist(), task).items():
        assert found[f"val/{key}"] == pytest.approx(value, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30))
def test_auroc_with_ties(pairs):
    truth, score = [t for t, _ in pairs], [s for _, s in pairs]
    assert auroc(truth, score) == pytest.approx(reference.auroc(truth, score), abs=1e-12, nan_ok=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 4), st.sampled_from([0.0, 0.2, 0.6]))
def test_f1(seed, count, classes, share):
    rng = np.random.default_rng(seed)
    truth, predicted = rng.random((2, count, classes)) < share
    expected = reference.f1_scores(truth.tolist(), predicted.tolist())
    assert f1_scores(truth, predicted) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
@pytest.mark.parametrize("sharpness", [0.2, 1.0, 12.0])
def test_temperature(task, sharpness):
    logits, labels = world(11, task, count=150)
    # Labels that the logits explain, so that the best temperature lies inside of the bounds.
    if task == "multilabel":
        labels = (np.random.default_rng(2).random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    else:
        hit = np.random.default_rng(2).random(len(labels)) < 0.7
        labels = np.where(hit, logits.argmax(axis=1), labels)
    expected = reference.temperature(sharpness * logits, labels, task)
    assert LOWEST * 2 < expected < HIGHEST / 2
    assert fit_temperature(sharpness * logits, labels, task) == pytest.approx(expected, rel=1e-5)
