"""Grids: one process and one JSON file a cell, resumable, failures recorded."""

import json
import sys
import textwrap
from pathlib import Path

import pytest
from polymodal import experiments
from polymodal.errors import UserError
from polymodal.experiments import find_program, load_experiment, run_experiment, table_of
from polymodal.tables import FORMATS

PROGRAM = """\
#!{python}
import importlib.util, json, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("f", {factory!r})
factory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(factory)
options = dict(a[2:].split("=", 1) for a in sys.argv[1:])
with open({calls!r}, "a") as calls:
    calls.write(json.dumps(options) + "\\n")
if options.get("mode") == "fail":
    print("error: cannot do that")
    sys.exit(2)
if options.get("mode") == "nothing":
    sys.exit(0)
seed = int(options["seed"])
data = {{"name": "synthetic", "fingerprint": options.get("data", "f1"), "root": "/home/me/data"}}
factory.write_run(Path(options["out"]) / "slt" / "r", seed=seed, method=options["method"], data=data,
                  metrics={{"test/bleu4": float(options["score"]) + seed}})
"""


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """An experiment file and the options of every call of its program."""
    calls = tmp_path / "calls.jsonl"
    factory = Path(__file__).with_name("_run_factory.py")
    program = tmp_path / "fake-train"
    program.write_text(PROGRAM.format(python=sys.executable, factory=str(factory), calls=str(calls)))
    program.chmod(0o755)
    monkeypatch.setattr(experiments, "find_program", lambda name: program)
    monkeypatch.chdir(tmp_path)

    def make(text):
        path = tmp_path / "e.yaml"
        path.write_text(textwrap.dedent(text))
        return load_experiment(path), lambda: [json.loads(x) for x in calls.read_text().splitlines()]

    return make


GRID = """
name: fusion
command: fake-train --quiet=1
base: {method: m, score: 1, options: {a: [1, null, true]}}
cells:
  ssaw: {score: 90}
  none: {score: 50}
seeds: [0, 1]
metrics: [test/bleu4]
against: none
"""


def test_every_cell_is_run_once_and_recorded(grid):
    experiment, calls = grid(GRID)
    records = run_experiment(experiment)
    assert [(r["cell"], r["seed"], r["metrics"]["test/bleu4"]) for r in records] == [
        ("ssaw", 0, 90.0),
        ("none", 0, 50.0),
        ("ssaw", 1, 91.0),
        ("none", 1, 51.0),
    ]
    first = calls()[0]
    assert (first["seed"], first["score"], first["quiet"]) == ("0", "90", "1")
    assert first["options"] == '{"a": [1, null, true]}'
    assert len({c["out"] for c in calls()}) == 4
    saved = json.loads((experiment.results / "ssaw-seed1.json").read_text())
    assert saved == records[2]
    assert saved["run"]["fidelity"] == "reconstruction"
    assert saved["versions"]["torch"] == "2.9.0"


def test_no_folder_of_this_machine_gets_into_the_results(grid, tmp_path):
    experiment, _ = grid(GRID)
    run_experiment(experiment)
    text = "".join(p.read_text() for p in experiment.results.iterdir())
    assert str(tmp_path) not in text
    assert "/home/me" not in text


def test_finished_cells_are_kept_and_changed_ones_run_again(grid):
    experiment, calls = grid(GRID)
    run_experiment(experiment)
    run_experiment(experiment)
    assert len(calls()) == 4
    experiment, calls = grid(GRID.replace("score: 50", "score: 40"))
    assert [r["metrics"]["test/bleu4"] for r in run_experiment(experiment)] == [90.0, 40.0, 91.0, 41.0]
    assert len(calls()) == 6


def test_a_run_that_finished_before_its_record_was_written_is_not_repeated(grid):
    experiment, calls = grid(GRID)
    run_experiment(experiment)
    (experiment.results / "ssaw-seed0.json").unlink()
    (experiment.results / "ssaw-seed1.json").write_text('{"half')
    assert len(run_experiment(experiment)) == 4
    assert len(calls()) == 4


def test_a_failing_cell_is_recorded_and_the_others_go_on(grid):
    experiment, calls = grid(GRID.replace("ssaw: {score: 90}", "bad: {mode: fail}\n  odd: {mode: nothing}"))
    records = {(r["cell"], r["seed"]): r for r in run_experiment(experiment, jobs=2)}
    assert records["bad", 0]["status"] == "failed"
    assert records["bad", 0]["error"] == "exit code 2: error: cannot do that"
    assert records["odd", 0]["error"] == "the command left no finished run folder"
    assert records["none", 1]["status"] == "finished"
    run_experiment(experiment)
    assert len(calls()) == 6 + 4  # the failed ones were tried again
    table = table_of(experiment)
    assert [r.group for r in table.rows] == ["none"]
    assert "failed: bad-seed0 (exit code 2: error: cannot do that)" in table.notes[0]


def test_the_table_has_paired_differences_and_names_what_is_missing(grid):
    experiment, _ = grid(GRID)
    with pytest.raises(UserError, match="no finished cell in .*run `polymodal experiments run` first"):
        table_of(experiment)
    run_experiment(experiment)
    (experiment.results / "none-seed1.json").unlink()
    text = FORMATS["md"]([table_of(experiment)])
    assert "| ssaw | reconstruction |     2 | 90.50 ± 0.71 |" in text
    assert "| ssaw        |     1 |     +40.00 |" in text
    assert "- not run yet with these settings: none-seed1" in text


def test_results_on_different_data_are_not_mixed(grid):
    experiment, _ = grid(GRID.replace("{score: 90}", "{score: 90, data: f2}"))
    run_experiment(experiment)
    with pytest.raises(UserError, match="2 data fingerprints"):
        table_of(experiment)
    assert len(table_of(experiment, mix=True).rows) == 2


def test_a_metric_that_no_cell_reports_is_noted(grid):
    experiment, _ = grid(GRID.replace("[test/bleu4]", "[test/bleu4, test/wer]"))
    run_experiment(experiment)
    assert table_of(experiment).notes == ("no cell reports test/wer",)


def test_a_newer_record_is_refused(grid):
    experiment, _ = grid(GRID)
    run_experiment(experiment)
    path = experiment.results / "ssaw-seed0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))
    with pytest.raises(UserError, match="ssaw-seed0.json: schema version 2; this polymodal reads up to 1"):
        run_experiment(experiment)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds: [0, 1]", "seeds: [0, 0]"), r"seeds: \[0, 0\]; a seed stands there twice"),
        (("seeds: [0, 1]", "seeds: 3"), "seeds: 3; expected a list of integers"),
        (("against: none", "against: nobody"), "against: nobody is not a cell; cells are ssaw, none"),
        (("against: none", "agianst: none"), "unknown key agianst; keys are name"),
        (("metrics: [test/bleu4]", ""), "missing metrics"),
        (("ssaw:", "a/b:"), "'a/b' becomes a file name"),
        (("{score: 90}", "{seed: 3}"), "the runner sets seed itself"),
        (("{score: 90}", "7"), "cells: expected label"),
        (("name: fusion", "- x"), "not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_line(grid, change, message):
    with pytest.raises(UserError, match=message):
        grid(GRID.replace(*change))


def test_a_missing_file_and_program_are_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_experiment(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="command 'no-such-train' is not in"):
        find_program("no-such-train")
    assert find_program("polymodal").name.startswith("polymodal")


def test_jobs_below_one_are_refused(grid):
    experiment, _ = grid(GRID)
    with pytest.raises(UserError, match="--jobs 0; expected at least 1"):
        run_experiment(experiment, jobs=0)
