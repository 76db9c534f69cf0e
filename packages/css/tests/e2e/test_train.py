"""css-train as its users call it: the smoke preset from end to end, every method, what it says about itself."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from css.checkpoint import load_network
from css.methods import METHODS
from css.metrics import segmentation_report
from css.module import CSSModule
from css.report import read_reports
from css.steps import load_weights
from PIL import Image
from polymodal.testing import manifest, metric_rows, read_offline, run_script

PROGRAM = Path(sys.executable).parent / "css-train"
TINY = ["--config", "smoke", "--data.images", "[16, 4, 8]", "--data.classes", "3", "--trainer.max_epochs", "1"]
TINY += ["--loader.batch_size", "4", "--memory.budget", "4"]


# ------------------------------------------------------------------ the run folder


def test_a_run_leaves_what_is_promised(css_run: Path) -> None:
    for step in range(3):
        files = {"weights.safetensors", "report.json", "confusion.json", "predictions.png", "done.json"}
        assert {path.name for path in (css_run / "steps" / f"{step:02d}").iterdir()} == files | (
            {"memory"} if step else set()
        )
    assert {path.name for path in css_run.iterdir()} == {
        "checkpoints", "config.yaml", "figures", "manifest.json", "metrics.csv", "steps",
    }  # fmt: skip
    assert {path.name for path in (css_run / "figures").iterdir()} == {"iou.png", "predictions.png"}
    assert {path.name for path in (css_run / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_the_manifest_has_the_final_scores_and_how_they_were_measured(css_run: Path) -> None:
    facts = manifest(css_run)
    assert (facts["status"], facts["method"], facts["fidelity"]) == ("finished", "eir", "reconstruction")
    assert facts["data"]["task"] == "2-1"
    assert facts["data"]["order"] == [1, 2, 3, 4]
    reports = read_reports(css_run / "steps")
    assert facts["metrics"]["test/miou_all"] == reports[-1].all
    assert facts["metrics"]["test/miou_avg"] == pytest.approx(np.mean([report.all for report in reports]))
    names = {f"test/{name}" for name in ("miou_old", "miou_new", "miou_all", "miou_harmonic", "miou_avg", "forgetting")}
    assert names <= facts["metrics"].keys()
    assert facts["metric_signatures"].keys() == facts["metrics"].keys()
    assert "crop 64" in facts["metric_signatures"]["test/miou_all"]


def test_metrics_go_by_optimizer_step_and_tests_by_continual_step(css_run: Path) -> None:
    found = metric_rows(css_run)
    keys = [(row["step"], row["name"]) for row in found if row["epoch"] == ""]
    assert len(keys) == len(set(keys)), "each value of a test is written once"
    assert [float(row["value"]) for row in found if row["name"] == "task"] == [0, 1, 2]
    done = [json.loads((css_run / "steps" / f"0{step}" / "done.json").read_text()) for step in range(3)]
    ends = [facts["optimizer_steps"] for facts in done]
    assert [int(row["step"]) for row in found if row["name"] == "test/miou_all"] == ends
    assert len([row for row in found if row["name"] == "test/miou_new"]) == 2, "step 0 has no new classes"
    assert int(found[-1]["step"]) == ends[-1]
    steps = [int(row["step"]) for row in found]
    assert steps == sorted(steps)
    assert {"train/bce", "train/kd", "train/pasted", "val/miou_all", "perf/data_wait"} <= {r["name"] for r in found}


def test_reports_are_those_of_the_confusion_matrices(css_run: Path) -> None:
    for step, report in enumerate(read_reports(css_run / "steps")):
        confusion = json.loads((css_run / "steps" / f"0{step}" / "confusion.json").read_text())
        assert confusion["channels"] == 3 + step
        scores = segmentation_report(np.array(confusion["matrix"]), 2, step)
        assert (report.old, report.all) == (scores["old"], scores["all"])
        assert [score.name for score in report.classes] == ["disc", "square", "triangle", "cross"][: 2 + step]
        assert [score.step for score in report.classes] == [0, 0, 1, 2][: 2 + step]


def test_weights_say_what_they_belong_to(css_run: Path) -> None:
    for step in range(3):
        state, meta = load_weights(css_run / "steps" / f"0{step}" / "weights.safetensors")
        assert meta["channels"] == [2, 1, 1][: step + 1]
        assert (meta["task"], meta["order"], meta["method"], meta["crop"]) == ("2-1", [1, 2, 3, 4], "eir", 64)
        assert meta["fingerprint"] == manifest(css_run)["data"]["fingerprint"]
        assert not any(name.startswith("ctx") or "old" in name.split(".") for name in state)
    assert load_network(css_run).meta["step"] == 2, "a run folder stands for its last step"


def test_normalisation_statistics_stay_those_of_the_base_step(css_run: Path) -> None:
    states = [load_weights(css_run / "steps" / f"0{step}" / "weights.safetensors")[0] for step in range(3)]
    frozen = [name for name in states[0] if "running" in name or "num_batches" in name]
    assert len(frozen) >= 6
    assert any(bool((states[0][name] != 0).any()) for name in frozen if name.endswith("running_mean"))
    for later in states[1:]:
        assert all(torch.equal(states[0][name], later[name]) for name in frozen)
    convolutions = [name for name in states[0] if name.endswith("weight") and states[0][name].ndim == 4]
    assert any(not torch.equal(states[0][name], states[2][name]) for name in convolutions), "the network has learnt"


def test_the_old_network_is_that_of_the_step_before_and_stays_so(
    css_train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: dict[tuple[int, str], dict[str, torch.Tensor]] = {}

    def keep(self: CSSModule, moment: str) -> None:
        assert self.ctx.old is None or not self.ctx.old.training
        state = {} if self.ctx.old is None else self.ctx.old.state_dict()
        met[self.ctx.step, moment] = {name: value.clone() for name, value in state.items()}

    for hook in ("on_fit_start", "on_test_epoch_end"):
        original = getattr(CSSModule, hook)
        monkeypatch.setattr(
            CSSModule, hook, lambda self, hook=hook, original=original: (keep(self, hook), original(self))
        )
    result = css_train(*TINY, "--task", "1-1")
    assert result.code == 0, result.err
    (folder,) = (tmp_path / "runs" / "css").iterdir()
    for step in (1, 2):
        stored, _ = load_weights(folder / "steps" / f"0{step - 1}" / "weights.safetensors")
        for moment in ("on_fit_start", "on_test_epoch_end"):
            assert met[step, moment].keys() == stored.keys()
            assert all(torch.equal(met[step, moment][name], value) for name, value in stored.items())


# ------------------------------------------------------------------ the console script


def test_the_console_script_logs_to_wandb_offline_with_the_task_as_axis(cache_folder: Path, tmp_path: Path) -> None:
    done = run_script([PROGRAM, *TINY], tmp_path, POLYMODAL_CACHE=str(cache_folder))
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "css").iterdir()
    assert f"run folder  runs/css/{folder.name}" in done.stdout
    assert re.search(r"\| triangle +\| +1 \|", done.stdout)
    assert "harmonic" in done.stdout
    assert "\x1b[" not in done.stdout + done.stderr, "no colours and bars where there is no terminal"
    (command,) = [line.split("upload")[1].strip() for line in done.stdout.splitlines() if line.startswith("upload")]
    _, history, axes = read_offline(tmp_path / command.removeprefix("wandb sync "))
    assert axes["test/*"] == "task"
    assert (axes["train/*"], axes["val/*"]) == ("step", "step")
    tested = [row for row in history if "test/miou_all" in row]
    assert [row["task"] for row in tested] == [0, 1]
    assert tested[1]["test/miou_all"] == manifest(folder)["metrics"]["test/miou_all"]
    assert "test/forgetting" in tested[1]
    shown = [row["task"] for row in history if any(name.startswith("test/predictions") for name in row)]
    assert shown == [0, 1]
    assert len(list((folder / "wandb").rglob("media/images/test/*.png"))) == 2


def test_a_stored_configuration_repeats_its_run_bit_for_bit(css_train, css_run: Path, tmp_path: Path) -> None:
    result = css_train("--config", css_run)
    assert result.code == 0, result.err
    (folder,) = (tmp_path / "runs" / "css").iterdir()
    for step in range(3):
        name = f"steps/0{step}/weights.safetensors"
        assert (folder / name).read_bytes() == (css_run / name).read_bytes()
    assert manifest(folder)["metrics"] == manifest(css_run)["metrics"]


def test_a_finished_run_is_shown_again(css_train, css_run: Path, tmp_path: Path) -> None:
    folder = copied(css_run, tmp_path)
    before = {path: path.read_bytes() for path in (folder / "steps").rglob("*") if path.is_file()}
    result = css_train("--resume", folder)
    assert result.code == 0, result.err
    assert "| triangle" in result.out
    assert {path: path.read_bytes() for path in (folder / "steps").rglob("*") if path.is_file()} == before
    assert manifest(folder)["status"] == "finished"
    assert metric_rows(folder) == metric_rows(css_run)


def copied(css_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(css_run, tmp_path / "runs" / "css" / css_run.name))


# ------------------------------------------------------------------ methods and settings


@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_learns_a_task_from_end_to_end(css_train, tmp_path: Path, method: str) -> None:
    result = css_train(*TINY, "--method", method)
    assert result.code == 0, result.err
    (folder,) = (tmp_path / "runs" / "css").iterdir()
    reports = read_reports(folder / "steps")
    assert len(reports) == (1 if method == "joint" else 2)
    assert [score.step for score in reports[-1].classes] == [0, 0, 1]
    assert (folder / "steps" / "01" / "memory" / "index.json").is_file() == (METHODS.create(method).memory != "none")
    assert manifest(folder)["method"] == method


SETTINGS = {
    "disjoint": ["--setting", "disjoint"],
    "sequential": ["--setting", "sequential", "--method", "replay"],
    "partitioned": ["--setting", "partitioned"],
    "order": ["--order", "[3, 1, 2]", "--task", "1-1"],
    "native": ["--loader.eval_size", "native", "--loader.unseen_as", "ignore"],
    "bf16": ["--trainer.precision", "bf16-mixed"],
    "accumulate": ["--trainer.accumulate", "2", "--trainer.max_steps", "3"],
    "no memory": ["--memory.budget", "0"],
    "epochs": ["--later_epochs", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_trains(css_train, tmp_path: Path, options: list[str]) -> None:
    result = css_train(*TINY, *options)
    assert result.code == 0, result.err
    (folder,) = (tmp_path / "runs" / "css").iterdir()
    assert manifest(folder)["status"] == "finished"
    order = manifest(folder)["data"]["order"]
    assert [score.raw for score in read_reports(folder / "steps")[-1].classes] == order


# ------------------------------------------------------------------ what it says about itself


def test_help_fits_two_screens_and_starts_with_an_example(css_train) -> None:
    result = css_train("--help")
    lines = result.out.splitlines()
    assert result.code == 0
    assert lines[2] == "Example:"
    assert lines[3].strip().startswith("css-train ")
    assert len(lines) <= 100
    for option in ("--task", "--setting", "--method", "--data", "--resume", "--list-methods", "voc_15-1"):
        assert any(option in line for line in lines), option


def test_methods_are_listed_with_paper_and_fidelity(css_train) -> None:
    result = css_train("--list-methods")
    assert [line.split()[0] for line in result.out.splitlines()] == METHODS.names()
    assert all("[" in line and "20" in line for line in result.out.splitlines())


def test_a_dry_run_tells_the_pictures_of_each_step_and_writes_nothing(css_train, css_run: Path, tmp_path: Path) -> None:
    result = css_train("--config", css_run, "--dry_run", "true")
    assert result.code == 0, result.err
    assert not (tmp_path / "runs").exists()
    steps = re.findall(r"^step (\d+) +(\d+) training, +(\d+) test pictures; .*: (.*)$", result.out, re.MULTILINE)
    assert [row[3] for row in steps] == ["disc, square", "triangle", "cross"]
    assert [int(row[2]) for row in steps] == [report.images for report in read_reports(css_run / "steps")]
    assert "nothing was trained" in result.out


def test_pictures_are_drawn(css_run: Path) -> None:
    for name in ("figures/iou.png", "steps/01/predictions.png"):
        with Image.open(css_run / name) as picture:
            assert min(picture.size) > 100
            assert len(picture.convert("RGB").getcolors(10**7)) > 20
