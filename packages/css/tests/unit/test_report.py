"""Reports of a step: scores against a loop over classes, files, and the table at the end."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from css.report import (
    StepReport,
    class_table,
    closing_table,
    over_steps,
    read_confusion,
    read_report,
    read_reports,
    write_confusion,
    write_report,
)
from css.task import Task
from polymodal.errors import UserError

NAMES = ["ant", "bee", "cat", "dog"]


def counts(channels, seed=0):
    made = np.random.default_rng(seed).integers(0, 50, (channels, channels))
    made[np.diag_indices(channels)] += 100
    return made


def iou_by_loop(matrix, channel):
    hits = int(matrix[channel, channel])
    union = sum(int(v) for v in matrix[channel]) + sum(int(v) for v in matrix[:, channel]) - hits
    return 100 * hits / union if union else 0.0


def three_steps(order=()):
    task = Task("2-1", 4, order)
    return [StepReport.of(counts(task.num_channels(s), s), task, NAMES, s, images=10 + s) for s in range(3)]


def cells(table):
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_scores_are_those_of_a_loop_over_classes():
    report = three_steps()[2]
    matrix = counts(5, 2)
    iou = [iou_by_loop(matrix, channel) for channel in range(5)]
    assert report.iou == pytest.approx(iou)
    assert report.background_iou == pytest.approx(iou[0])
    assert report.old == pytest.approx(sum(iou[:3]) / 3)
    assert report.new == pytest.approx(sum(iou[3:]) / 2)
    assert report.all == pytest.approx(sum(iou) / 5)
    assert report.harmonic == pytest.approx(2 / (1 / report.old + 1 / report.new))
    assert report.images == 12


def test_classes_keep_their_name_and_id_in_another_order():
    report = three_steps(order=(3, 1, 4, 2))[2]
    assert [(c.name, c.raw, c.channel, c.step) for c in report.classes] == [
        ("cat", 3, 1, 0),
        ("ant", 1, 2, 0),
        ("dog", 4, 3, 1),
        ("bee", 2, 4, 2),
    ]


def test_the_base_step_has_neither_new_nor_harmonic():
    report = three_steps()[0]
    assert math.isnan(report.new)
    assert math.isnan(report.harmonic)
    assert report.metrics() == {"miou_old": report.old, "miou_all": report.all}
    assert report.old == report.all


def test_joint_training_is_reported_with_the_steps_of_the_task_it_is_compared_with():
    report = StepReport.of(counts(5), Task("2-1", 4), NAMES, 0)
    assert report.step == 0
    assert [c.step for c in report.classes] == [0, 0, 1, 2]
    assert set(report.metrics()) == {"miou_old", "miou_new", "miou_all", "miou_harmonic"}
    assert report.metrics() == three_of_last(counts(5)).metrics()


def three_of_last(matrix):
    return StepReport.of(matrix, Task("2-1", 4), NAMES, 2)


@pytest.mark.parametrize("shape", [(3, 4), (6, 6), (3,)])
def test_a_matrix_that_cannot_be_of_the_task_is_refused(shape):
    with pytest.raises(ValueError, match="confusion matrix"):
        StepReport.of(np.ones(shape, int), Task("2-1", 4), NAMES, 0)


def test_files_give_back_the_same_report(tmp_path):
    for report in three_steps():
        folder = tmp_path / f"{report.step:02d}"
        folder.mkdir()
        write_report(folder, report)
        again = read_report(folder)
        assert repr(again) == repr(report)  # equality fails on NaN
        assert np.array_equal(again.confusion, report.confusion)
    assert [report.step for report in read_reports(tmp_path)] == [0, 1, 2]
    stored = json.loads((tmp_path / "00" / "report.json").read_text())
    assert stored["new"] is None  # JSON has no NaN
    assert stored["classes"][1] == {"name": "bee", "raw": 2, "channel": 2, "step": 0, "iou": again_iou(tmp_path)}


def again_iou(folder):
    return float(read_report(folder / "00").classes[1].iou)


def test_scores_can_be_read_without_the_matrix(tmp_path):
    write_report(tmp_path, three_steps()[1])
    (tmp_path / "confusion.json").unlink()
    assert read_report(tmp_path).confusion is None


def test_a_confusion_matrix_of_many_classes_is_one_line_a_row(tmp_path):
    path, matrix = tmp_path / "confusion.json", counts(151) * 10**12
    write_confusion(path, matrix)
    assert np.array_equal(read_confusion(path), matrix)
    assert len(path.read_text().splitlines()) < 160


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("report.json", None, "No such file"),
        ("report.json", "{", "not valid JSON"),
        ("report.json", "[]", "expected an object"),
        ("report.json", '{"step": 0}', "not a report"),
        ("report.json", '{"schema_version": 99}', "newer version"),
        ("confusion.json", '{"channels": 2}', "no confusion matrix"),
        ("confusion.json", '{"channels": 2, "matrix": [[1]]}', "shape"),
        ("confusion.json", '{"channels": 2, "matrix": [[1, 2], [3]]}', "no confusion matrix"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(tmp_path, name, text, says):
    write_report(tmp_path, three_steps()[0])
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as raised:
        read_report(tmp_path)
    assert str(tmp_path / name) in str(raised.value)
    assert says in str(raised.value)


def test_forgetting_is_measured_against_the_best_step_before():
    reports = three_steps()
    best = [max(r.iou[c] for r in reports[:2] if len(r.iou) > c) for c in (1, 2, 3)]
    fallen = [b - reports[2].iou[c] for b, c in zip(best, (1, 2, 3), strict=True)]
    found = over_steps(reports)
    assert found["forgetting"] == pytest.approx(sum(fallen) / 3)
    assert found["miou_avg"] == pytest.approx(sum(r.all for r in reports) / 3)
    assert set(over_steps(reports[:1])) == {"miou_avg"}
    table = cells(closing_table(reports))
    for name, value in zip(NAMES, fallen, strict=False):
        assert table[name][-1] == f"{value:.1f}"
    assert table["all"][-1] == f"{sum(fallen) / 3:.1f}"


def test_the_closing_table_has_every_class_and_mean_after_every_step():
    reports = three_steps(order=(3, 1, 4, 2))
    text = closing_table(reports)
    table = cells(text)
    assert list(table)[2:] == ["background", "cat", "ant", "dog", "bee", "old", "new", "all", "harmonic"]
    assert table["class"] == ["learnt in", "after 0", "after 1", "after 2", "forgetting"]
    assert table["dog"][:3] == ["1", "–", f"{reports[1].iou[3]:.1f}"]
    assert table["bee"] == ["2", "–", "–", f"{reports[2].iou[4]:.1f}", "–"]
    assert table["new"][1:4] == ["–", f"{reports[1].new:.1f}", f"{reports[2].new:.1f}"]
    assert text.endswith("\n")
    assert f"{over_steps(reports)['miou_avg']:.1f}." in text
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1


def test_a_single_step_has_no_column_of_forgetting():
    text = closing_table(three_steps()[:1])
    assert "forgetting" not in text
    assert cells(text)["class"] == ["learnt in", "after 0"]


def test_many_classes_are_shown_by_step():
    task, names = Task("100-50", 150), [f"c{i}" for i in range(150)]
    reports = [StepReport.of(counts(task.num_channels(s), s), task, names, s) for s in range(2)]
    table = cells(closing_table(reports))
    assert len(table) == 9
    assert table["step 0: 100 classes"][2] == f"{reports[1].iou[1:101].mean():.1f}"
    assert table["step 1: 50 classes"][1:3] == ["–", f"{reports[1].iou[101:].mean():.1f}"]
    lost = (reports[0].iou - reports[1].iou[:101])[1:].mean()
    assert table["step 0: 100 classes"][3] == f"{lost:.1f}"
    assert len(cells(class_table(reports[1]))) == 157  # all of them, two lines of head, background, four means


def test_the_class_table_of_a_step_gives_ids_of_the_data_set():
    report = three_steps(order=(3, 1, 4, 2))[1]
    table = cells(class_table(report))
    assert table["cat"] == ["3", "0", f"{report.iou[1]:.1f}"]
    assert table["dog"] == ["4", "1", f"{report.iou[3]:.1f}"]
    assert "bee" not in table
    assert table["harmonic"][-1] == f"{report.harmonic:.1f}"


def test_a_score_of_minus_nothing_is_nothing():
    reports = three_steps()
    table = closing_table([reports[0], reports[0]])
    assert "-0.0" not in table
    assert cells(table)["ant"][-1] == "0.0"
