"""Runs killed at the moments that matter end like the run that nobody killed."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from missing_modal import job, train
from missing_modal.module import MMModule
from polymodal.callbacks import load_checkpoint
from polymodal.forked import Patch, at_call, die, half_a_row, interrupt, run_forked
from polymodal.testing import assert_same_results, folder_of, manifest

OPTIONS = ["--config", "world", "--trainer.max_epochs", "3", "--loader.batch_size", "48", "--log.wandb", "off"]
OPTIONS += ["--trainer.progress", "none", "--trainer.log_every_steps", "1"]


def mm_train(out: Path, *arguments: object, patch: Patch = lambda: None) -> tuple[int, str]:
    """The command in a forked process that ``patch`` prepares; exit code (negative: signal) and stderr."""
    return run_forked(train.main, ["mm-train", *arguments], out, patch)


def contents(run: Path) -> dict[str, bytes]:
    """Every file of the result."""
    parts = [run / name for name in ("report.json", "calibration.json", "towers.safetensors")]
    parts += [path for name in ("tables", "export", "samples") for path in sorted((run / name).iterdir())]
    return {str(path.relative_to(run)): path.read_bytes() for path in parts}


def same(whole: Path, killed: Path) -> None:
    assert_same_results(whole, killed)
    left, right = contents(whole), contents(killed)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []
    for name in ("last", "best"):
        states = [load_checkpoint(run / "checkpoints" / f"{name}.ckpt")["state_dict"] for run in (whole, killed)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items()), name


@pytest.fixture(scope="module")
def whole(cache_folder, small, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYMODAL_CACHE", str(cache_folder))
        code, error = mm_train(out, *OPTIONS, *small)
    assert code == 0, error
    return folder_of(out)


# ------------------------------------------------------------------ moments


def at_loss(number: int, happen: Callable[[], None] = die) -> Patch:
    """In the middle of an optimizer step, counted from 1; an epoch has four."""
    return at_call(MMModule, "loss", number, happen, after=True)


MOMENTS: dict[str, Patch] = {
    "first batch": at_loss(1),
    "middle of the second epoch": at_loss(6),
    "last batch": at_loss(12),
    "validation": at_call(MMModule, "validation_step", 2),
    "trained, not calibrated": at_call(job.Job, "calibrate"),
    "test": at_call(MMModule, "test_step"),
    "tested, not exported": at_call(job.Job, "_write_exports"),
    "half a row of metrics": half_a_row(7, 1),
}
FAST = {("middle of the second epoch", 1), ("validation", 0), ("trained, not calibrated", 0)}
CASES = [
    pytest.param(moment, every, marks=[] if (moment, every) in FAST else pytest.mark.slow)
    for moment in MOMENTS
    for every in (0, 1)
]


@pytest.mark.parametrize(("moment", "every"), CASES)
def test_killed_and_resumed(whole: Path, small, tmp_path: Path, moment: str, every: int) -> None:
    """``every``: optimizer steps between checkpoints within an epoch; 0: only at the ends of epochs."""
    options = [*OPTIONS, *small, "--trainer.checkpoint_every_steps", every]
    code, error = mm_train(tmp_path, *options, patch=MOMENTS[moment])
    assert code == -signal.SIGKILL, error
    killed = folder_of(tmp_path)
    assert manifest(killed)["status"] == "running"
    if every:
        code, error = mm_train(tmp_path, "--resume", killed)  # a run folder brings its own configuration
    else:
        code, error = mm_train(tmp_path, *options, "--resume", "auto")
    assert code == 0, error
    same(whole, killed)
    assert len(manifest(killed)["resumed"]) == 1


@pytest.mark.slow
def test_killed_again_and_again(whole: Path, small, tmp_path: Path) -> None:
    patches = [at_loss(3), at_loss(6), at_call(MMModule, "validation_step", 1), at_call(job.Job, "calibrate")]
    assert mm_train(tmp_path, *OPTIONS, *small, patch=patches[0])[0] == -signal.SIGKILL
    for patch in patches[1:]:
        code, error = mm_train(tmp_path, *OPTIONS, *small, "--resume", "auto", patch=patch)
        assert code == -signal.SIGKILL, error
    code, error = mm_train(tmp_path, *OPTIONS, *small, "--resume", "auto")
    assert code == 0, error
    same(whole, folder_of(tmp_path))
    assert len(manifest(folder_of(tmp_path))["resumed"]) == len(patches)


METHODS = [
    ["--method", "mean_imputation"],  # looks at the training set before training
    ["--method", "modality_dropout"],  # draws which modalities go, trains copies of the encoders
    ["--method", "dcp", "--missing.simulate", "true", "--loader.num_workers", "1"],
    ["--method", "msp", "--method_options.train_out", "true"],
]


@pytest.mark.slow
@pytest.mark.parametrize("options", METHODS, ids=lambda options: options[1])
def test_other_methods_too(small, tmp_path: Path, options: list[str]) -> None:
    every = ["--trainer.checkpoint_every_steps", 1]
    for name in ("whole", "killed"):
        patch = at_loss(6) if name == "killed" else lambda: None
        code, error = mm_train(tmp_path / name, *OPTIONS, *small, *options, *every, patch=patch)
        assert code == (-signal.SIGKILL if name == "killed" else 0), error
    killed = folder_of(tmp_path / "killed")
    code, error = mm_train(tmp_path / "killed", "--resume", killed)
    assert code == 0, error
    same(folder_of(tmp_path / "whole"), killed)


# ------------------------------------------------------------------ Ctrl-C


def test_ctrl_c_saves_and_says_how_to_go_on(whole: Path, small, tmp_path: Path) -> None:
    code, error = mm_train(tmp_path, *OPTIONS, *small, patch=at_loss(6, interrupt))
    stopped = folder_of(tmp_path)
    assert code == 130, error
    assert error.rstrip().endswith(f"saved at step 6; continue with --resume {stopped}")
    assert "Traceback" not in error
    assert manifest(stopped)["status"] == "interrupted"
    code, error = mm_train(tmp_path, "--resume", stopped)
    assert code == 0, error
    same(whole, stopped)


@pytest.mark.slow
def test_ctrl_c_while_temperatures_are_fitted(whole: Path, small, tmp_path: Path) -> None:
    code, error = mm_train(tmp_path, *OPTIONS, *small, patch=at_call(job.Job, "calibrate", 1, interrupt))
    stopped = folder_of(tmp_path)
    assert code == 130, error
    assert f"--resume {stopped}" in error
    assert manifest(stopped)["status"] == "interrupted"
    code, error = mm_train(tmp_path, "--resume", stopped)
    assert code == 0, error
    same(whole, stopped)


# ------------------------------------------------------------------ what cannot go on


REFUSED = {
    "another method": (["--method", "head_only"], "a run with method dcp, not head_only"),
    "another rate": (["--missing.ratio", "0.5"], "a run with missing"),
    "other tables": (["--missing.seed", "5"], "a run with tables"),
    "another seed": (["--seed", "4"], "a run with seed 0, not 4"),
    "other data": (["--data.noise", "0.5"], "the data changed"),
    "other encoders": (["--backbone.seed", "1"], "a run with backbone"),
    "other options": (["--method_options.depth", "1"], "a run with method_options"),
}


@pytest.mark.parametrize("case", ["another method", "other encoders"])
def test_a_run_goes_on_as_it_began_or_not_at_all(whole: Path, tmp_path: Path, case: str) -> None:
    _refused(whole, tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED.keys() - {"another method", "other encoders"})
def test_so_it_is_with_other_changes(whole: Path, tmp_path: Path, case: str) -> None:
    _refused(whole, tmp_path, case)


def _refused(whole: Path, tmp_path: Path, case: str) -> None:
    options, says = REFUSED[case]
    run = tmp_path / "runs" / "missing_modal" / whole.name
    shutil.copytree(whole, run)
    code, error = mm_train(tmp_path, "--resume", run, *options)
    assert code == 2, error
    assert says in error.splitlines()[-1], error
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert all((run / path).read_bytes() == (whole / path).read_bytes() for path in files), "nothing is lost"
