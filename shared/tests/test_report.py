"""Selecting runs and metrics, tables a task, curves, files."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from polymodal.curves import average, to_png
from polymodal.errors import UserError
from polymodal.report import ReportOptions, collect, render, write_report
from polymodal.run_reader import Point

_spec = importlib.util.spec_from_file_location("_run_factory", Path(__file__).with_name("_run_factory.py"))
factory = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(factory)


@pytest.fixture
def runs(tmp_path):
    """Two methods with two seeds, one failed run, one half-written manifest."""
    root = tmp_path / "runs"
    for method, base in (("ssaw", 90.0), ("none", 50.0)):
        for seed in (0, 1):
            curve = [(step, step // 10, base * step / 20 + seed) for step in (10, 20)]
            factory.write_run(
                root / "slt" / f"{method}-{seed}",
                method=method,
                seed=seed,
                metrics={"test/bleu4": base + seed, "test/rouge_l": base + 2 * seed},
                curves={"val/bleu4": curve, "test/bleu4": [(20, 2, base)]},
                config_hash=method,
            )
    factory.write_run(root / "slt" / "failed", status="failed", seed=5)
    (root / "slt" / "cut").mkdir()
    (root / "slt" / "cut" / "manifest.json").write_text("{")
    return root


def options(runs, **changes):
    return ReportOptions(runs=(runs,), **changes)


def test_default_report_is_one_table_by_method(runs):
    (report,) = collect(options(runs, against="none"))
    assert report.table.title == "slt: synthetic (f00df00df00d)"
    assert {r.group: r.summaries["test/bleu4"].mean for r in report.table.rows} == {"ssaw": 90.5, "none": 50.5}
    assert {r.group: r.fidelity for r in report.table.rows}["ssaw"] == "reconstruction"
    notes = "\n".join(report.table.notes)
    assert "cut/manifest.json: not valid JSON" in notes
    assert "left out: 1 failed; `--unfinished` includes them" in notes
    assert len(report.records) == 5


def test_unfinished_runs_on_request(runs):
    (report,) = collect(options(runs, unfinished=True))
    assert next(r for r in report.table.rows if r.group == "ssaw").seeds == (0, 1, 5)


def test_rows_by_any_key_of_manifest_or_config(runs):
    (report,) = collect(options(runs, by="fusion.name"))
    assert [r.group for r in report.table.rows] == ["none", "ssaw"]
    (report,) = collect(options(runs, by="method,seed"))
    assert [r.group for r in report.table.rows] == ["none / 0", "none / 1", "ssaw / 0", "ssaw / 1"]


def test_an_unknown_key_suggests_one(runs):
    with pytest.raises(UserError, match=r"--by fusion\.nam: no run has this key.*did you mean fusion\.name"):
        collect(options(runs, by="fusion.nam"))


def test_conditions_select_runs(runs):
    (report,) = collect(options(runs, where=("method=s*", "seed=1")))
    assert [(r.group, r.seeds) for r in report.table.rows] == [("ssaw", (1,))]
    with pytest.raises(UserError, match="no run under .* fulfils method=gbt"):
        collect(options(runs, where=("method=gbt",)))
    with pytest.raises(UserError, match=r"--where method: expected KEY=VALUE"):
        collect(options(runs, where=("method",)))


def test_metrics_by_name_and_pattern(runs):
    (report,) = collect(options(runs, metrics=("test/r*", "test/bleu4")))
    assert report.table.metrics == ("test/rouge_l", "test/bleu4")
    with pytest.raises(UserError, match=r"--metric test/bleu: no run has it; did you mean test/bleu4"):
        collect(options(runs, metrics=("test/bleu",)))


def test_many_metrics_are_cut_and_noted(tmp_path):
    factory.write_run(tmp_path / "r", metrics={f"test/m{i:02d}": float(i) for i in range(11)})
    (report,) = collect(options(tmp_path))
    assert len(report.table.metrics) == 8
    assert "3 more metrics" in report.table.notes[0]


def test_each_task_and_kind_of_job_has_its_table(runs):
    factory.write_run(runs / "css" / "r", task="css", metrics={"test/miou_all": 40.0}, data={"name": "voc"})
    factory.write_run(runs / "slt" / "eval", job_type="eval", started="2026-01-01T00:00:00+00:00")
    reports = collect(options(runs))
    titles = {(r.task, r.job) for r in reports}
    assert titles == {("slt", "train"), ("slt", "eval"), ("css", "train")}
    assert next(r for r in reports if r.task == "css").table.title == "css: voc"


def test_a_metric_of_one_task_leaves_the_runs_of_others_out(runs):
    factory.write_run(runs / "css" / "a", task="css", metrics={"test/miou_all": 60.0}, metric_signatures={})
    assert [r.task for r in collect(options(runs, metrics=("test/bleu4",)))] == ["slt"]
    assert {r.task for r in collect(options(runs, metrics=("test/*",)))} == {"slt", "css"}
    with pytest.raises(UserError, match="no run has it"):
        collect(options(runs, metrics=("test/nothing",)))


def test_different_data_are_refused(runs):
    factory.write_run(runs / "slt" / "other", method="gbt", data={"name": "phoenix", "fingerprint": "beef"})
    with pytest.raises(UserError, match=r"2 data fingerprints.*--mix"):
        collect(options(runs))
    (report,) = collect(options(runs, where=("data.name=phoenix",)))
    assert [r.group for r in report.table.rows] == ["gbt"]
    assert "2 data fingerprints" in collect(options(runs, mix=True))[0].table.notes[2]


def test_nothing_to_report_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match=r"no run under .*: expected folders with a manifest\.json"):
        collect(options(tmp_path))
    factory.write_run(tmp_path / "r", status="running")
    with pytest.raises(UserError, match=r"no finished run under .* \(1 are running\); --unfinished includes them"):
        collect(options(tmp_path))


def test_files_are_written_and_a_second_report_does_not_read_them_as_runs(runs):
    asked = options(runs)
    files = write_report(collect(asked), asked, runs / "report", ["md", "csv", "tex", "html"], plot=True)
    assert [f.name for f in files] == ["report.md", "report.csv", "report.tex", "report.html", "val-bleu4.png"]
    assert files[0].read_text() == render(collect(asked), "md", asked)
    assert files[-1].read_bytes().startswith(b"\x89PNG\r\n")


def test_average_of_curves_on_different_steps():
    first = [Point(0, 0, 0.0), Point(10, 0, 10.0), Point(20, 0, 20.0)]
    second = [Point(0, 0, 2.0), Point(20, 0, 22.0)]
    (curve,) = average({"a": [first, second], "empty": [[]]})
    assert curve.steps.tolist() == [0, 10, 20]
    assert curve.mean.tolist() == [1.0, 11.0, 21.0]
    assert curve.sd == pytest.approx([np.sqrt(2)] * 3)
    assert curve.runs == 2


def test_a_shorter_run_is_not_extended():
    (curve,) = average({"a": [[Point(0, 0, 1.0), Point(10, 0, 1.0)], [Point(0, 0, 3.0), Point(20, 0, 3.0)]]})
    assert curve.mean.tolist() == [2.0, 2.0, 3.0]
    assert curve.sd.tolist()[-1] == 0.0


def test_long_curves_are_thinned_with_their_ends():
    line = [Point(i, 0, float(i)) for i in range(5001)]
    (curve,) = average({"a": [line]}, max_points=50)
    assert len(curve.steps) == 50
    assert (curve.steps[0], curve.steps[-1]) == (0, 5000)
    assert np.array_equal(curve.steps, curve.mean)


def test_a_picture_of_more_groups_than_colours():
    curves = average({f"g{i}": [[Point(0, 0, float(i)), Point(1, 0, i + 1.0)]] for i in range(10)})
    assert to_png("test", curves, dpi=40).startswith(b"\x89PNG")
