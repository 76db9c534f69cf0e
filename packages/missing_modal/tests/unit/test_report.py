"""The report of a run: scores by pattern, before and after calibration, as file, table and line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from missing_modal.calibration import Temperatures
from missing_modal.metrics import score_samples, summarise
from missing_modal.records import Packed
from missing_modal.report import (
    calibration_line,
    closing_table,
    make_report,
    read_report,
    sample_rows,
    write_report,
)
from polymodal.errors import UserError

FACTS = {"method": "dcp", "data": "world", "split": "test", "missing": "both, 70 % of the rows"}
NAMES = ("image", "text")
TEMPERATURES = Temperatures({3: 0.5, 1: 2.0, 2: 1.5})


def packed(count=60, classes=2, seed=0, masks=(3, 1, 2)):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes)) + 1.5 * np.eye(classes)[labels]
    return Packed([f"s{n}" for n in range(count)], logits, labels, np.array(masks * count)[:count])


def report_of(temperatures=TEMPERATURES, task="binary", fitted_on=50, **options):
    return make_report(
        packed(**options), temperatures, task=task, modalities=NAMES, fitted_on=fitted_on, **FACTS
    )  # fmt: skip


def test_rows_are_all_and_the_patterns_that_occur():
    assert [(row.pattern, row.samples) for row in report_of().rows] == [
        ("all", 60), ("complete", 20), ("image", 20), ("text", 20),
    ]  # fmt: skip
    assert [row.pattern for row in report_of(masks=(3, 2)).rows] == ["all", "complete", "text"]


def test_scores_are_those_of_the_rows_samples():
    held = packed()
    row = report_of().of("image")
    chosen = held.masks == 1
    plain = summarise(score_samples(held.logits[chosen], held.labels[chosen], "binary"))
    assert row.scores == plain
    after = summarise(score_samples(held.logits[chosen] / 2.0, held.labels[chosen], "binary"))
    assert row.calibrated == {name: after[name] for name in ("nll", "brier", "ece")}
    assert row.temperature == 2.0
    assert report_of().of("all").temperature is None


def test_what_is_not_defined_is_left_out():
    held = Packed(["a", "b"], np.zeros((2, 2)), np.array([1, 1]), np.array([3, 3]))
    row = make_report(held, None, task="binary", modalities=NAMES, fitted_on=0, **FACTS).of("all")
    assert "auroc" not in row.scores
    assert row.calibrated == {}


def test_round_trip(tmp_path):
    report = report_of()
    write_report(tmp_path, report)
    assert read_report(tmp_path) == report


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "give the folder of a finished run"),
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ('{"schema_version": 1}', "not a report"),
        ('{"schema_version": 9}', "newer version"),
    ],
)
def test_damaged_reports(tmp_path, content, says):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match=says):
        read_report(tmp_path)


def test_the_table_has_a_line_a_pattern_and_says_what_is_missing():
    lines = closing_table(report_of()).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "present", "samples", "accuracy", "auroc", "nll", "ece", "T", "nll at T", "ece at T",
    ]  # fmt: skip
    assert [line.split("|")[1].strip() for line in lines[2:6]] == ["all", "complete", "image", "text"]
    complete = [cell.strip() for cell in lines[3].strip("|").split("|")]
    row = report_of().of("complete")
    assert complete[2:4] == [f"{100 * row.scores['accuracy']:.1f}", f"{100 * row.scores['auroc']:.1f}"]
    assert complete[6] == "0.50"
    assert "dcp on world, test split, missing: both, 70 % of the rows" in lines[-1]


def test_without_calibration_there_are_no_such_columns():
    report = report_of(None, fitted_on=0)
    assert "nll at T" not in closing_table(report)
    assert calibration_line(report).startswith("calibration: none")


def test_the_calibration_line_says_what_changed():
    row = report_of().of("all")
    line = calibration_line(report_of())
    assert f"ece {100 * row.scores['ece']:.1f} -> {100 * row.calibrated['ece']:.1f} %" in line
    assert line.endswith("complete 0.50, image 2.00, text 1.50; fitted on 50 validation samples)")
    assert calibration_line(report_of(fitted_on=49)).endswith("49 validation samples: few, trust them little)")


def test_several_labels_show_f1():
    rng = np.random.default_rng(1)
    held = Packed(["a"] * 9, rng.normal(size=(9, 4)), rng.integers(0, 2, (9, 4)), np.array([3, 1, 2] * 3))
    report = make_report(held, None, task="multilabel", modalities=NAMES, fitted_on=0, **FACTS)
    assert "| f1_macro | f1_micro |" in closing_table(report)


def test_a_few_predictions_of_each_pattern():
    columns, rows = sample_rows(
        packed(), TEMPERATURES, task="binary", modalities=NAMES, names=["no", "yes"], each=2
    )  # fmt: skip
    assert columns == ["id", "present", "truth", "prediction", "probability"]
    assert [row[:2] for row in rows] == [
        ["s0", "complete"], ["s3", "complete"], ["s1", "image"], ["s4", "image"], ["s2", "text"], ["s5", "text"],
    ]  # fmt: skip
    z = packed().logits[1] / 2.0
    assert rows[2][4] == pytest.approx((np.exp(z) / np.exp(z).sum()).max(), abs=1e-4)
    json.dumps(rows)


def test_predictions_of_several_labels_are_lists_of_names():
    held = Packed(["a"], np.array([[3.0, -3.0, 2.0]]), np.array([[1, 0, 0]]), np.array([3]))
    _, rows = sample_rows(held, None, task="multilabel", modalities=NAMES, names=["x", "y", "z"])
    assert rows == [["a", "complete", "x", "x, z", 0.9526]]
