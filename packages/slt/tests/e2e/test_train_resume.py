"""Runs of both stages, killed at the moments that matter, end like the run that nobody killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from polymodal.callbacks import Checkpoints, load_checkpoint
from polymodal.forked import Patch, at_call, die, half_a_row, interrupt, kill_and_resume, run_forked
from polymodal.testing import assert_same_results, folder_of, manifest, rows
from slt import probes, train
from slt.module import SLTModule

# 16 clips in batches of 4: 4 steps an epoch, steps 1 to 8 in stage 1, 9 to 16 in stage 2.
OPTIONS = ["--config", "smoke", "--data.sizes", "[16, 4, 4]", "--loader.batch_size", "4", "--stage1_epochs", "2"]
OPTIONS += ["--epochs", "2", "--log.wandb", "off", "--trainer.progress", "none"]


def slt_train(out: Path, *arguments: object, patch: Patch = lambda: None) -> tuple[int, str]:
    """The command in a forked process that ``patch`` prepares; exit code (negative: signal) and stderr."""
    return run_forked(train.main, ["slt-train", *arguments], out, patch)


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints" / f"{name}.ckpt")["state_dict"]


def same(whole: Path, killed: Path) -> None:
    assert_same_results(whole, killed)
    for name in ("last", "best", "stage1"):
        left, right = weights(whole, name), weights(killed, name)
        assert left.keys() == right.keys()
        assert all(torch.equal(value, right[key]) for key, value in left.items()), name
    for file in ("audit.json", "samples/test-translations.jsonl", "predictions/ssaw.jsonl"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.fixture(scope="module")
def whole(cache_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYMODAL_CACHE", str(cache_folder))
        code, error = slt_train(out, *OPTIONS)
    assert code == 0, error
    folder = folder_of(out)
    steps = [int(row[0]) for row in rows(folder)[1:] if row[2] == "train/loss"]
    assert steps == list(range(1, 17))
    return folder


# ------------------------------------------------------------------ moments


def between_best_and_last_of_stage_2() -> None:
    """Stage 2 has written its first best weights; the last checkpoint is still stage 1's."""
    original = Checkpoints.on_validation_end

    def on_validation_end(self, trainer, module):
        original(self, trainer, module)
        if self.stage == 2:
            die()

    Checkpoints.on_validation_end = on_validation_end


def between_the_stages() -> None:
    """Stage 1 is complete, nothing of stage 2 exists."""
    from slt import losses

    losses.transfer_stage1 = lambda *arguments: die()


def in_the_test() -> None:
    """Training is over, some of the test clips are translated."""
    SLTModule.test_step = lambda *arguments: die()


def in_the_audit() -> None:
    """The test's rows are written, the audit's probe is being trained."""
    probes.question_only_predictions = lambda *arguments: die()


def at_loss(number: int, happen: Callable[[], None] = die) -> Patch:
    """In the middle of a training step, counted over both stages."""
    return at_call(SLTModule, "loss", number, happen, after=True)


MOMENTS: dict[str, Patch] = {
    "stage 1, first step": at_loss(1),
    "stage 1, second epoch": at_loss(6),
    "between the stages": between_the_stages,
    "stage 2, first epoch": at_loss(11),
    "between best and last of stage 2": between_best_and_last_of_stage_2,
    "stage 2, second epoch": at_loss(14),
    "half a row of metrics": half_a_row(11, 0),
    "test": in_the_test,
    "audit": in_the_audit,
}
FAST = ("stage 1, second epoch", "between best and last of stage 2", "stage 2, second epoch")


@pytest.mark.parametrize("every", [0, 1], ids=["checkpoints at epoch ends", "checkpoints at every step"])
@pytest.mark.parametrize(
    "moment", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MOMENTS]
)
def test_killed_and_resumed(whole: Path, tmp_path: Path, moment: str, every: int) -> None:
    code, error = slt_train(tmp_path, *OPTIONS, "--trainer.checkpoint_every_steps", every, patch=MOMENTS[moment])
    assert code == -signal.SIGKILL, error
    killed = folder_of(tmp_path)
    assert manifest(killed)["status"] == "running"
    what = killed if every else "auto"
    options = [] if every else OPTIONS  # a run folder brings its own configuration
    code, error = slt_train(tmp_path, *options, "--resume", what)
    assert code == 0, error
    same(whole, killed)
    assert len(manifest(killed)["resumed"]) == 1


@pytest.mark.slow
def test_killed_again_and_again(whole: Path, tmp_path: Path) -> None:
    patches = [at_loss(3), at_loss(4), between_best_and_last_of_stage_2, at_loss(2), in_the_audit]
    assert slt_train(tmp_path, *OPTIONS, patch=patches[0])[0] == -signal.SIGKILL
    for patch in patches[1:]:
        assert slt_train(tmp_path, *OPTIONS, "--resume", "auto", patch=patch)[0] == -signal.SIGKILL
    code, error = slt_train(tmp_path, *OPTIONS, "--resume", "auto")
    assert code == 0, error
    same(whole, folder_of(tmp_path))
    assert len(manifest(folder_of(tmp_path))["resumed"]) == 5


@pytest.mark.slow
def test_a_damaged_checkpoint_of_stage_2_goes_back_to_stage_1(whole: Path, tmp_path: Path) -> None:
    assert slt_train(tmp_path, *OPTIONS, patch=at_loss(14))[0] == -signal.SIGKILL
    killed = folder_of(tmp_path)
    assert load_checkpoint(killed / "checkpoints" / "previous.ckpt")["polymodal"]["stage"] == 1
    (killed / "checkpoints" / "last.ckpt").write_bytes(b"nothing")
    code, error = slt_train(tmp_path, "--resume", killed)
    assert code == 0, error
    assert "going on from previous.ckpt" in error
    same(whole, killed)


def test_ctrl_c_in_stage_2_saves_and_says_how_to_go_on(whole: Path, tmp_path: Path) -> None:
    code, error = slt_train(tmp_path, *OPTIONS, patch=at_loss(10, interrupt))
    killed = folder_of(tmp_path)
    assert code == 130
    assert error.strip().splitlines()[-1] == f"slt-train: saved at step 2; continue with --resume {killed}"
    assert manifest(killed)["status"] == "interrupted"
    code, error = slt_train(tmp_path, "--resume", killed)
    assert code == 0, error
    same(whole, killed)


# ------------------------------------------------------------------ stage 1 on its own


def test_stage_1_alone_gives_the_weights_that_both_stages_start_from(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "one"
    code, error = slt_train(out, *OPTIONS, "--stage", "1")
    assert code == 0, error
    first = folder_of(out)
    names = {
        "test/loss",
        "test/contrastive_vs",
        "test/contrastive_vq",
        "test/restore_question",
        "test/restore_sentence",
    }
    assert set(manifest(first)["metrics"]) == names
    left, right = weights(first, "best"), weights(whole, "stage1")
    assert all(torch.equal(value, right[key]) for key, value in left.items())
    code, error = slt_train(out, "--resume", first)
    assert code == 0, error
    assert set(manifest(first)["metrics"]) == names
    # Stage 2 from its folder is stage 2 of the run of both, but for the steps that count from 0.
    for number, source in enumerate((first, whole, whole / "checkpoints" / "stage1.ckpt")):
        options = ["--stage", "2", "--stage1_checkpoint", source, "--audit.question_only", "false"]
        code, error = slt_train(tmp_path / f"two{number}", *OPTIONS, *options)
        assert code == 0, error
        second = folder_of(tmp_path / f"two{number}")
        assert manifest(second)["metrics"]["test/bleu4"] == manifest(whole)["metrics"]["test/bleu4"]
        left, right = weights(second, "last"), weights(whole, "last")
        assert all(torch.equal(value, right[key]) for key, value in left.items())


def test_a_checkpoint_of_stage_2_is_no_start_for_stage_2(whole: Path, tmp_path: Path) -> None:
    last = whole / "checkpoints" / "last.ckpt"
    code, error = slt_train(tmp_path, *OPTIONS, "--stage", "2", "--stage1_checkpoint", last)
    assert code == 2
    assert error.strip().splitlines()[-1].startswith(f"slt-train: error: {last} is no checkpoint of stage 1")


# ------------------------------------------------------------------ the x-axis


def steps(folder: Path) -> list[int]:
    return [int(row[0]) for row in rows(folder)[1:] if row[2] == "train/loss"]


def test_steps_of_both_stages_follow_each_other_when_stopped_by_steps(tmp_path: Path) -> None:
    options = ["--trainer.max_steps", "3", "--audit.enabled", "false"]
    code, error = slt_train(tmp_path, *OPTIONS, *options)
    assert code == 0, error
    assert steps(folder_of(tmp_path)) == [1, 2, 3, 4, 5, 6]


PROGRAM = Path(sys.executable).parent / "slt-train"


@pytest.mark.slow
def test_two_processes_share_one_run(tmp_path: Path) -> None:
    options = ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--audit.question_only", "false"]
    options += ["--out", str(tmp_path / "runs"), "--trainer.progress", "plain"]
    done = subprocess.run([PROGRAM, *OPTIONS, *options], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = folder_of(tmp_path)
    assert manifest(folder)["status"] == "finished"
    # 2 steps an epoch: each process has half of the 4 batches.
    assert steps(folder) == list(range(1, 9))
    assert len(rows(folder)) == len({tuple(row[:3]) for row in rows(folder)}), "rank 0 alone writes"
    assert done.stderr.count("epoch 1/2") == 2, "a line an epoch and stage"
    assert len(json.loads((folder / "audit.json").read_text())["rows"]) >= 3
    ids = [json.loads(line)["video_id"] for line in (folder / "predictions" / "ssaw.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 4


@pytest.mark.slow
def test_the_console_script_killed_at_any_moment(whole: Path, tmp_path: Path) -> None:
    """As it happens to users: SIGKILL from outside, whenever; then ``--resume auto``."""
    for step in (3, 7, 10, 13):
        out = tmp_path / str(step)
        kill_and_resume([PROGRAM, *OPTIONS, "--trainer.checkpoint_every_steps", 1], out, step)
        same(whole, folder_of(out))
