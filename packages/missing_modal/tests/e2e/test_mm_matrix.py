"""mm-matrix as its users call it: a small grid from end to end, resumed, looked up anew, on given runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from missing_modal import evaluate as evaluate_command
from missing_modal import matrix_command
from missing_modal.matrix import LogitCache
from polymodal.testing import QUIET, manifest

QUICK = [*QUIET, "--trainer.max_epochs", "1", "--loader.eval_batch_size", "50"]


@pytest.fixture
def call(call_command):
    """A command in this process, W&B off."""
    return lambda *arguments, main=matrix_command.main, name="mm-matrix": call_command(main, name, *arguments)


@pytest.fixture
def grid(small, tmp_path):
    """Options of a grid of two models."""
    tests = ["--train_kinds", "text", "both", "--test_ratios", "0", "0.7", "1", "--test_seeds", "0", "1"]
    return [*small, *QUICK, *tests, "--results", str(tmp_path / "matrix"), "--out", str(tmp_path / "runs")]


def models(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "models" / "missing_modal").iterdir() if path.is_dir())


def cells(folder: Path, name: str) -> dict:
    return json.loads((folder / "cells" / f"{name}.json").read_text())


def test_a_grid_from_end_to_end_then_nothing_is_done_twice(call, grid, tmp_path):
    folder = tmp_path / "matrix"
    result = call(*grid)
    assert result.code == 0, result.err
    assert "2/2 dcp-both" in result.err
    assert "logits differ" not in result.err, "a line a model, not what each training says"
    assert "### matrix: test/accuracy on world" in result.out
    assert {path.name for path in folder.iterdir()} == {
        "cells", "curves.png", "heat_map.png", "logits", "models", "table.md",
    }  # fmt: skip
    assert len(models(folder)) == 2
    record = cells(folder, "dcp-text-0.7-seed0")
    assert record["train"] == {"kind": "text", "ratio": 0.7, "seed": 0}
    assert len(record["cells"]["kind"]) == 2 * 3 * 2
    before = (folder / "table.md").read_text()

    again = call(*grid)
    assert again.code == 0
    assert "2 of them done before" in again.err
    assert len(models(folder)) == 2
    assert [line for line in (folder / "table.md").read_text().splitlines() if "looked up" not in line] == [
        line for line in before.splitlines() if "looked up" not in line
    ]


def test_a_cell_is_what_mm_eval_says(call, grid, tmp_path):
    assert call(*grid).code == 0
    folder = tmp_path / "matrix"
    record = cells(folder, "dcp-both-0.7-seed0")
    run = Path(record["run"])
    options = ["--missing.kind", "text", "--missing.ratio", "0.7", "--missing.seed", "1", "--log.wandb", "off"]
    result = call(run, *options, "--out", tmp_path / "evals", main=evaluate_command.main, name="mm-eval")
    assert result.code == 0, result.err
    (made,) = (tmp_path / "evals" / "missing_modal").iterdir()
    metrics = manifest(made)["metrics"]
    held = record["cells"]
    (place,) = [
        i for i in range(len(held["kind"])) if (held["kind"][i], held["ratio"][i], held["seed"][i]) == ("text", 0.7, 1)
    ]
    for name in ("test/accuracy", "test/nll", "test/auroc", "test/accuracy/image", "test/ece/complete"):
        assert held[name][place] == pytest.approx(metrics[name], abs=2e-6), name


def test_other_test_rates_are_looked_up_without_training(call, grid, tmp_path):
    assert call(*grid).code == 0
    at = grid.index("--test_ratios")
    other = [*grid[: at + 1], "0.5", *grid[at + 4 :]]
    result = call(*other, "--test_kinds", "image")
    assert result.code == 0, result.err
    assert "2 of them done before" in result.err
    record = cells(tmp_path / "matrix", "dcp-text-0.7-seed0")
    assert sorted(set(record["cells"]["ratio"])) == [0.5, 0.7]  # 0.7 is that of the table
    assert set(record["cells"]["kind"]) == {"image"}


def test_other_settings_are_trained_anew(call, grid, tmp_path):
    assert call(*grid).code == 0
    planned = call(*grid, "--optim.lr", "0.005", "--dry_run", "true")
    assert planned.out.splitlines() == ["would train dcp-text-0.7-seed0", "would train dcp-both-0.7-seed0"]
    assert call(*grid, "--dry_run", "true").out == "nothing left to train\n"


def test_an_interrupted_training_goes_on_in_its_folder(call, grid, tmp_path, monkeypatch):
    from missing_modal.job import Job

    original, stopped = Job.calibrate, []

    def stop_once(self, *arguments):
        if not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Job, "calibrate", stop_once)
    result = call(*grid)
    assert result.code == 130
    assert "the same command goes on where it stopped" in result.err
    (half,) = models(tmp_path / "matrix")
    assert manifest(half)["status"] == "interrupted"
    result = call(*grid)
    assert result.code == 0, result.err
    assert half in models(tmp_path / "matrix")
    assert len(models(tmp_path / "matrix")) == 2
    assert manifest(half)["status"] == "finished"


def test_runs_that_were_trained_before(call, mm_run, tmp_path, complains):
    options = ["--test_ratios", "0", "1", "--results", tmp_path / "given", "--test_seeds", "0"]
    result = call("--runs", mm_run, *options)
    assert result.code == 0, result.err
    record = cells(tmp_path / "given", "dcp-both-0.7-seed3")
    assert record["run"] == str(mm_run)
    cache, _ = LogitCache.load(tmp_path / "given" / "logits" / "dcp-both-0.7-seed3-test.npz")
    assert not cache.missing_passes
    assert len(cache) == 128
    assert np.isfinite(cache.logits(cache.natural)).all()
    complains(call("--runs", mm_run, mm_run, *options), "the same method, pattern and seed")
    complains(call("--runs", tmp_path, *options), "no config.yaml of mm-train there")


@pytest.mark.slow
def test_two_processes_give_the_same_cells(call, grid, tmp_path):
    assert call(*grid).code == 0
    other = [str(tmp_path / "parallel") if word == str(tmp_path / "matrix") else word for word in grid]
    result = call(*other, "--jobs", "2")
    assert result.code == 0, result.err
    for name in ("dcp-text-0.7-seed0", "dcp-both-0.7-seed0"):
        assert cells(tmp_path / "matrix", name)["cells"] == cells(tmp_path / "parallel", name)["cells"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--train_kinds", "audio"], "expected one of none, both, any, image, text"),
        (["--methods", "dpc"], "dcp"),
        (["--seeds", "0", "0"], "none of them twice"),
        (["--seeds", "x"], "seeds"),
        (["--resume", "auto"], "goes on by itself"),
        (["--missing.tables", "."], "draws its tables"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(arguments, part, call, complains, tmp_path):
    complains(call(*arguments, "--results", tmp_path / "m"), part)
    assert not (tmp_path / "m").exists()


def test_help_begins_with_an_example(call):
    result = call("--help")
    assert result.code == 0
    assert result.out.splitlines()[2] == "Example:"
    assert len(result.out.splitlines()) <= 100
