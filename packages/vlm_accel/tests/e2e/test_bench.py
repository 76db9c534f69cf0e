"""vlm-bench as its users call it: the built-in model from nothing, a checkpoint with JSONL files, resuming, errors."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vlm_accel.bench import world
from vlm_accel.bench_command import main
from vlm_accel.dashboard import SECTIONS

PROGRAM = Path(sys.executable).parent / "vlm-bench"
QUIET = ["--log.wandb", "off"]
ROWS = ["full", "drop-0.5", "random@vision-0.5", "visionzip-0.5", "window_kv-0.5"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMODAL_CACHE", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("POLYMODAL_SHARED_RUN", raising=False)


@pytest.fixture(scope="module")
def first(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run folder and output of the smoke preset through the console script, the model trained on the way."""
    out = tmp_path_factory.mktemp("first")
    environment = {**os.environ, "POLYMODAL_CACHE": str(cache), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    environment.pop("POLYMODAL_SHARED_RUN", None)
    command = [str(PROGRAM), "--config", "smoke", "--out", str(out), "--log.wandb", "offline"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    (folder,) = (out / "vlm_accel").iterdir()
    return folder, done.stdout + done.stderr


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vlm-bench", *map(str, words)])
    return main()


def test_a_run_leaves_table_figure_rows_and_metrics(first: tuple[Path, str]) -> None:
    folder, said = first
    assert {path.stem for path in (folder / "cells").iterdir()} == {f"{row}-seed0" for row in ROWS}
    assert (folder / "figures" / "pareto.png").stat().st_size > 10_000
    assert (folder / "wandb").is_dir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["job_type"], manifest["data"]["name"]) == ("finished", "eval", "digits")
    assert {"test/accuracy", "bench/drop-0.5/fidelity_kl", "bench/window_kv-0.5/kv_bytes"} <= set(manifest["metrics"])
    with (folder / "results.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [row["row"] for row in rows] == ROWS
    assert [row["row"] for row in map(json.loads, (folder / "samples" / "bench-rows.jsonl").open())] == ROWS
    for text in ("training the built-in model", "argmax", str(folder), "wandb sync"):
        assert text in " ".join(said.split()), text


def test_figures_are_those_of_the_methods(first: tuple[Path, str]) -> None:
    records = {r["label"]: r["metrics"] for r in json.loads((first[0] / "results.json").read_text())}
    full, dropped, shorter, cached = (records[name] for name in (*ROWS[:3], ROWS[4]))
    assert full["fidelity/kl"] == 0
    assert [dropped[f"tokens/llm_0{layer}"] for layer in range(6)] == [64, 64, 45, 45, 32, 32]
    assert dropped["macs/vision"] == full["macs/vision"]
    assert shorter["macs/vision"] < full["macs/vision"]
    assert shorter["macs/total"] < dropped["macs/total"] < full["macs/total"]
    assert cached["macs/total"] == full["macs/total"]
    assert cached["kv/bytes"] < 0.6 * full["kv/bytes"]
    assert dropped["ideal/prefill_speedup"] == pytest.approx(full["macs/prefill"] / dropped["macs/prefill"])
    for record in (dropped, shorter, cached):
        assert record["time/prefill_ms"] > 0
        assert record["speedup/prefill"] == pytest.approx(record["time/prefill_ms_plain"] / record["time/prefill_ms"])


def test_training_and_rows_are_in_metrics_csv_under_the_dashboards_names(first: tuple[Path, str]) -> None:
    with (first[0] / "metrics.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    names = {row["name"] for row in rows}
    assert sum(row["name"] == "train/loss" for row in rows) == 2
    lines = [panel for section in SECTIONS for panel in section.panels if panel.kind == "line"]
    wanted = {name for panel in lines for name in panel.metrics}
    assert wanted - names <= {"test/retained"}, "which needs a model that is right somewhere"
    assert [float(row["value"]) for row in rows if row["name"] == "row"] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_the_second_run_trains_nothing_and_a_resumed_one_measures_what_is_missing(
    first: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "smoke", "--out", tmp_path, *QUIET, "--repeats", 0]
    assert call(monkeypatch, *words, "--methods", "drop", "random") == 0
    assert "training" not in capsys.readouterr().err
    (folder,) = (tmp_path / "vlm_accel").iterdir()
    (folder / "cells" / "random-0.5-seed0.json").unlink()
    kept = (folder / "cells" / "drop-0.5-seed0.json").stat().st_mtime_ns
    before = json.loads((folder / "results.json").read_text())
    assert call(monkeypatch, "--resume", folder, *QUIET) == 0
    said = capsys.readouterr().err
    assert "random-0.5" in said
    assert "drop-0.5" not in said
    assert (folder / "cells" / "drop-0.5-seed0.json").stat().st_mtime_ns == kept
    after = json.loads((folder / "results.json").read_text())
    with (folder / "metrics.csv").open() as handle:
        noted = [float(row["value"]) for row in csv.DictReader(handle) if row["name"] == "row"]
    assert noted == [0, 1, 2, 2], "only what was measured anew is logged again"
    assert [r["metrics"] for r in after] == [r["metrics"] for r in before], "rows are a function of the seed"


def _as_jsonl(folder: Path, count: int) -> Path:
    """Test canvases of the smoke preset in the offline layout."""
    samples = world.draw_samples(world.WorldOptions(train=48, val=8), "test", np.arange(count))
    (folder / "digits" / "media").mkdir(parents=True)
    lines = []
    for number in range(count):
        picture = np.repeat(samples.canvas[number][..., None], 3, axis=2)
        Image.fromarray(picture).save(folder / "digits" / "media" / f"{number}.png")
        words = [world.VOCABULARY[i] for i in samples.answer[number] if i not in (world.PAD, world.EOS)]
        question = f"{world.KINDS[samples.kind[number]]} ?"
        lines.append(
            json.dumps({"id": number, "question": question, "answer": " ".join(words), "images": [f"{number}.png"]})
        )
    (folder / "digits" / "test.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_a_checkpoint_with_its_processor_gives_what_the_built_in_path_gives(
    first: tuple[Path, str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = (cache / "vlm_accel" / "models").iterdir()
    data = _as_jsonl(tmp_path / "data", 16)
    words = ["--model", model, "--data", data, "--methods", "drop", "window_kv", "--ratios", 0.5, "--batch", 16]
    options = ["--kv_options", "sink=1,recent=1,window=2,interval=4", "--max_new_tokens", 5, "--repeats", 0]
    assert call(monkeypatch, *words, *options, "--out", tmp_path, *QUIET) == 0
    (folder,) = (tmp_path / "vlm_accel").iterdir()
    ours = {r["label"]: r["metrics"] for r in json.loads((folder / "results.json").read_text())}
    built_in = {r["label"]: r["metrics"] for r in json.loads((first[0] / "results.json").read_text())}
    for label in ("full", "drop-0.5", "window_kv-0.5"):
        assert ours[label]["test/digits/accuracy"] == built_in[label]["test/accuracy"]
        assert ours[label]["fidelity/kl"] == pytest.approx(built_in[label]["fidelity/kl"], abs=1e-6)
        predictions = folder / "cells" / f"{label}-seed0.predictions.jsonl"
        assert len([json.loads(line) for line in predictions.open()]) == 16


@pytest.mark.slow
def test_a_row_that_a_model_refuses_is_told_and_the_others_go_on(
    first: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "smoke", "--out", tmp_path, *QUIET, "--repeats", 0, "--methods", "drop", "--schedule"]
    assert call(monkeypatch, *words, "llm:7=0.5") == 0
    (folder,) = (tmp_path / "vlm_accel").iterdir()
    assert "drop was refused: llm step at layer 7" in (folder / "table.md").read_text()
    assert "refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "x.jsonl"], "--data without --model"),
        (["--model", "DIR"], "without --data"),
        (["--model", "DIR", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--methods", "dropp"], "did you mean drop"),
        (["--ratios", "1.5"], "expected shares left in (0, 1]"),
        (["--ratios", "0.5", "0.5"], "stands there twice"),
        (["--methods", "drop", "--schedule", "keep36"], "keep35"),
        (["--methods", "fastv@vision"], "works in llm"),
        (["--kv", "half"], "KV budget"),
        (["--config", "smok"], "no such file or preset"),
        (["--repeats", "-1"], "expected 0 or more"),
        (["--built_in.lr", "0"], "expected more than 0"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *words, "--out", tmp_path / "runs") == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if ": error: " in line]
    assert len(lines) == 1
    assert told in lines[0]
    assert not (tmp_path / "runs").exists(), "nothing was begun"


def test_a_dry_run_names_the_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--config", "smoke", "--dry_run", "true") == 0
    assert capsys.readouterr().out.splitlines() == [f"would measure {row}" for row in ROWS[1:]]


def test_help_starts_with_an_example_and_fits_two_screens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "vlm-bench " in lines[3]
    assert len(lines) < 110
