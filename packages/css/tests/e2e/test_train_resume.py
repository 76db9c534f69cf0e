"""Runs of three continual steps, killed at the moments that matter, end like the run that nobody killed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from css import pictures, report, steps, train
from css.memory import bank, build, folder
from css.module import CSSModule
from polymodal.forked import Patch, at_call, die, half_a_row, interrupt, kill_and_resume, run_forked
from polymodal.testing import assert_same_results, folder_of, manifest, rows

PROGRAM = Path(sys.executable).parent / "css-train"
OPTIONS = ["--config", "smoke", "--data.images", "[32, 8, 10]", "--loader.batch_size", "4", "--log.wandb", "off"]
OPTIONS += ["--trainer.progress", "none", "--trainer.log_every_steps", "1", "--memory.budget", "6"]


def css_train(out: Path, *arguments: object, patch: Patch = lambda: None) -> tuple[int, str]:
    """The command in a forked process that ``patch`` prepares; exit code (negative: signal) and stderr."""
    return run_forked(train.main, ["css-train", *arguments], out, patch)


def contents(run: Path) -> dict[str, bytes]:
    """Every file of the step folders and all figures."""
    files = [path for part in ("steps", "figures") for path in (run / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def same(whole: Path, killed: Path) -> None:
    assert_same_results(whole, killed)
    left, right = contents(whole), contents(killed)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []


@pytest.fixture(scope="module")
def whole(cache_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYMODAL_CACHE", str(cache_folder))
        code, error = css_train(out, *OPTIONS)
    assert code == 0, error
    found = folder_of(out)
    assert {"steps/00/weights.safetensors", "steps/02/memory/index.json", "figures/iou.png"} <= contents(found).keys()
    return found


# ------------------------------------------------------------------ moments


def at_loss(step: int, number: int, happen: Callable[[], None] = die) -> Patch:
    """In the middle of an optimizer step, counted within a continual step from 1."""

    def patch() -> None:
        original, calls = CSSModule.loss, [0]

        def loss(self, batch, generator):
            result = original(self, batch, generator)
            calls[0] += self.ctx.step == step
            if self.ctx.step == step and calls[0] == number:
                happen()
            return result

        CSSModule.loss = loss

    return patch


def in_the_test(step: int, happen: Callable[[], None] = die) -> Patch:
    """The fit of a step is complete, its test is not."""

    def patch() -> None:
        original = CSSModule.test_step

        def test_step(self, batch, number):
            if self.ctx.step == step:
                happen()
            original(self, batch, number)

        CSSModule.test_step = test_step

    return patch


MOMENTS: dict[str, Patch] = {
    "step 0, first batch": at_loss(0, 1),
    "step 0, second epoch": at_loss(0, 6),
    "step 0, test": in_the_test(0),
    "step 0, written but not done": at_call(steps, "write_done", 1),
    "step 1, memory half built": at_call(build, "_store", 3),
    "step 1, memory built": at_call(bank.InstanceBank, "__init__", 1),
    "step 1, first batch": at_loss(1, 1),
    "step 1, middle of an epoch": at_loss(1, 4),
    "step 1, last batch": at_loss(1, 10),
    "step 1, test": in_the_test(1),
    "step 1, weights without report": at_call(report, "write_report", 2),
    "step 1, written but not done": at_call(steps, "write_done", 2),
    "step 2, memory between two renames": at_call(folder, "_flush", 2),
    "step 2, first batch": at_loss(2, 1),
    "step 2, middle of an epoch": at_loss(2, 3),
    "half a row of metrics": half_a_row(14, 0),
    "all steps done": at_call(pictures, "iou_matrix", 1),
}
# The rest is slow together, not one by one: a kill and a resume take three seconds.
FAST = {
    ("step 0, second epoch", 0),
    ("step 1, memory half built", 0),
    ("step 1, middle of an epoch", 1),
    ("step 1, test", 0),
    ("step 2, first batch", 1),
}
CASES = [
    pytest.param(moment, every, marks=[] if (moment, every) in FAST else pytest.mark.slow)
    for moment in MOMENTS
    for every in (0, 1)
]


@pytest.mark.parametrize(("moment", "every"), CASES)
def test_killed_and_resumed(whole: Path, tmp_path: Path, moment: str, every: int) -> None:
    """``every``: optimizer steps between checkpoints within an epoch; 0: only at the ends of epochs."""
    code, error = css_train(tmp_path, *OPTIONS, "--trainer.checkpoint_every_steps", every, patch=MOMENTS[moment])
    assert code == -signal.SIGKILL, error
    killed = folder_of(tmp_path)
    assert manifest(killed)["status"] == "running"
    what = killed if every else "auto"
    options = [] if every else OPTIONS  # a run folder brings its own configuration
    code, error = css_train(tmp_path, *options, "--resume", what)
    assert code == 0, error
    same(whole, killed)
    assert len(manifest(killed)["resumed"]) == 1


@pytest.mark.slow
def test_killed_again_and_again(whole: Path, tmp_path: Path) -> None:
    patches = [
        at_loss(0, 3),
        at_loss(0, 2),
        at_call(build, "_store", 2),
        at_loss(1, 2),
        in_the_test(1),
        at_call(steps, "write_done", 1),
        at_call(folder, "_flush", 1),
    ]
    assert css_train(tmp_path, *OPTIONS, patch=patches[0])[0] == -signal.SIGKILL
    for patch in patches[1:]:
        code, error = css_train(tmp_path, *OPTIONS, "--resume", "auto", patch=patch)
        assert code == -signal.SIGKILL, error
    code, error = css_train(tmp_path, *OPTIONS, "--resume", "auto")
    assert code == 0, error
    same(whole, folder_of(tmp_path))
    assert len(manifest(folder_of(tmp_path))["resumed"]) == len(patches)


METHODS = [
    ["--method", "plop"],  # looks at all pictures before a step
    ["--method", "ssul_m"],  # fills half of each batch with entries of the memory
    ["--method", "dkd_m", "--setting", "sequential"],
    ["--method", "mib", "--setting", "partitioned"],
    ["--method_options.position_selection", "false", "--loader.num_workers", "1"],
]


@pytest.mark.slow
@pytest.mark.parametrize("options", METHODS, ids=lambda options: options[1])
def test_other_methods_too(tmp_path: Path, options: list[str]) -> None:
    for name in ("whole", "killed"):
        patch = at_loss(1, 4) if name == "killed" else lambda: None
        every = ["--trainer.checkpoint_every_steps", 1]
        code, error = css_train(tmp_path / name, *OPTIONS, *options, *every, patch=patch)
        assert code == (-signal.SIGKILL if name == "killed" else 0), error
    killed = folder_of(tmp_path / "killed")
    code, error = css_train(tmp_path / "killed", "--resume", killed)
    assert code == 0, error
    same(folder_of(tmp_path / "whole"), killed)


def test_a_step_that_is_not_done_is_trained_again_with_all_that_grew_from_it(whole: Path, tmp_path: Path) -> None:
    again = tmp_path / "runs" / "css" / whole.name
    shutil.copytree(whole, again)
    (again / "steps" / "01" / "done.json").unlink()
    (again / "steps" / "01" / "weights.safetensors").write_bytes(b"half a file")
    shutil.rmtree(again / "steps" / "02" / "memory" / "masks")
    code, error = css_train(tmp_path, "--resume", again)
    assert code == 2
    assert "delete the folder and resume the run: it is built again" in error.splitlines()[-1]
    shutil.rmtree(again / "steps" / "02" / "memory")
    code, error = css_train(tmp_path, "--resume", again)
    assert code == 0, error
    same(whole, again)


def test_a_leftover_of_a_killed_memory_is_swept_away(whole: Path, tmp_path: Path) -> None:
    assert css_train(tmp_path, *OPTIONS, patch=at_call(build, "_store", 7))[0] == -signal.SIGKILL
    step = folder_of(tmp_path) / "steps" / "02"
    assert [path.name for path in step.iterdir()] == [".memory.unfinished"]
    assert css_train(tmp_path, *OPTIONS, "--resume", "auto")[0] == 0
    assert {path.name for path in step.iterdir()} == {path.name for path in (whole / "steps" / "02").iterdir()}
    same(whole, folder_of(tmp_path))


# ------------------------------------------------------------------ Ctrl-C

STOPS: dict[str, tuple[Patch, str]] = {
    "step 1, middle of an epoch": (at_loss(1, 2, interrupt), "saved at step 2"),
    "step 2, test": (in_the_test(2, interrupt), "interrupted"),
    "step 1, memory half built": (at_call(build, "_store", 3, interrupt), "interrupted"),
    "twice in step 1": (at_loss(1, 2, lambda: (interrupt(), interrupt())), "interrupted"),
}


@pytest.mark.parametrize(
    "moment", [name if name == "step 2, test" else pytest.param(name, marks=pytest.mark.slow) for name in STOPS]
)
def test_ctrl_c_says_how_to_go_on(whole: Path, tmp_path: Path, moment: str) -> None:
    patch, what = STOPS[moment]
    code, error = css_train(tmp_path, *OPTIONS, patch=patch)
    stopped = folder_of(tmp_path)
    assert code == 130, error
    assert error.strip().splitlines()[-1] == f"css-train: {what}; continue with --resume {stopped}"
    assert "Traceback" not in error
    assert manifest(stopped)["status"] == "interrupted"
    code, error = css_train(tmp_path, "--resume", stopped)
    assert code == 0, error
    same(whole, stopped)


# ------------------------------------------------------------------ processes


@pytest.mark.slow
def test_two_processes_share_one_run(whole: Path, tmp_path: Path) -> None:
    options = ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--out", str(tmp_path / "runs")]
    options += ["--trainer.progress", "plain", "--trainer.checkpoint_every_steps", "1"]
    done = subprocess.run([PROGRAM, *OPTIONS, *options], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = folder_of(tmp_path)
    assert manifest(found)["status"] == "finished"
    assert {"steps/01/memory/index.json", "steps/02/memory/index.json"} <= contents(found).keys()
    assert len(rows(found)) == len({tuple(row[:3]) for row in rows(found)}), "rank 0 alone writes"
    assert done.stderr.count("epoch 1/2") == 3, "a line an epoch and step"
    for step in range(3):
        name = f"steps/{step:02d}/report.json"
        alone, shared = (json.loads((run / name).read_text()) for run in (whole, found))
        assert shared["images"] == alone["images"], "each picture is counted once"
    steps_of = [int(row[0]) for row in rows(found)[1:] if row[2] == "train/loss"]
    assert steps_of == list(range(1, len(steps_of) + 1))


@pytest.mark.slow
def test_the_console_script_killed_at_any_moment(whole: Path, tmp_path: Path) -> None:
    """As it happens to users: SIGKILL from outside, whenever; then ``--resume auto``."""
    for step in (3, 13):
        out = tmp_path / str(step)
        kill_and_resume([PROGRAM, *OPTIONS, "--trainer.checkpoint_every_steps", 1], out, step)
        same(whole, folder_of(out))
