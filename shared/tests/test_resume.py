"""A run killed at any moment and resumed equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from polymodal.testing import assert_same_results, manifest, rows


def resume(what: object) -> tuple[object, ...]:
    """Continue a run without the accident that its own configuration repeats."""
    return ("--resume", what, "--kill_at", -1, "--kill_in_write", -1, "--interrupt_at", -1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return {
        **checkpoint["state_dict"],
        **{
            f"optimizer.{k}.{n}": v for k, s in checkpoint["optimizer_states"][0]["state"].items() for n, v in s.items()
        },
    }


def same(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    assert manifest(a)["status"] == "finished"
    assert_same_results(a, b)


@pytest.fixture
def whole(toy_run) -> Path:
    code, folder, error = toy_run(out="whole")
    assert code == 0, error
    return folder


# 48 samples in batches of 8: 6 steps an epoch, 3 epochs; checkpoints every 2 steps and at epoch ends.
def test_killed_at_any_step(toy_run, whole: Path) -> None:
    for step in (2, 3, 5, 6, 7, 11, 12, 17, 18):
        code, folder, _ = toy_run("--kill_at", step, out=f"kill{step}")
        assert code == -9
        assert manifest(folder)["status"] == "running"
        code, again, error = toy_run(*resume(folder), out=f"kill{step}")
        assert (code, again) == (0, folder), error
        same(whole, folder)


def test_killed_in_the_middle_of_a_checkpoint_write(toy_run, whole: Path) -> None:
    for write in (1, 2, 3, 4, 7):
        code, folder, _ = toy_run("--kill_in_write", write, out=f"write{write}")
        assert code == -9
        code, _, error = toy_run(*resume(folder), out=f"write{write}")
        assert code == 0, error
        same(whole, folder)


def test_killed_twice(toy_run, whole: Path) -> None:
    _, folder, _ = toy_run("--kill_at", 5, out="twice")
    assert toy_run(*resume(folder), "--kill_at", 9, out="twice")[0] == -9
    assert toy_run(*resume(folder), out="twice")[0] == 0
    same(whole, folder)
    assert len(manifest(folder)["resumed"]) == 2


def test_workers_change_nothing(toy_run, whole: Path) -> None:
    code, folder, error = toy_run("--workers", 2, "--kill_at", 9, out="workers")
    assert code == -9, error
    code, _, error = toy_run("--workers", 2, *resume(folder), out="workers")
    assert code == 0, error
    same(whole, folder)


def test_ctrl_c_saves_and_says_how_to_go_on(toy_run, whole: Path) -> None:
    for step in (9, 12):
        code, folder, error = toy_run("--interrupt_at", step, out=f"int{step}")
        assert code == 130
        assert f"--resume {folder}" in error
        assert manifest(folder)["status"] == "interrupted"
        assert toy_run(*resume("auto"), "--interrupt_at", step, out=f"int{step}")[0] in (0, 130)
        code, _, error = toy_run(*resume(folder), out=f"int{step}")
        same(whole, folder)


def test_damaged_checkpoint_falls_back_and_says_so(toy_run, whole: Path) -> None:
    _, folder, _ = toy_run("--kill_at", 9, out="bad")
    last = folder / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    last.write_bytes(content)
    code, _, error = toy_run(*resume(folder), out="bad")
    assert code == 0
    assert "damaged" in error
    assert "going on from previous.ckpt" in error
    same(whole, folder)
    for name in ("last", "previous"):
        (folder / "checkpoints" / f"{name}.ckpt").write_bytes(b"nothing")
    code, _, error = toy_run(*resume(folder), out="bad")
    assert code == 2
    assert error.count("\n") == 1
    assert "damaged" in error


def test_killed_while_going_on_from_a_damaged_checkpoint(toy_run, whole: Path) -> None:
    """The damaged file never takes the place of the good one."""
    _, folder, _ = toy_run("--kill_at", 9, out="worse")
    last, previous = (folder / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    last.write_bytes(last.read_bytes()[:-500])
    good = previous.read_bytes()
    code, _, _ = toy_run(*resume(folder)[:2], "--kill_at", -1, "--kill_in_write", 0, out="worse")
    assert code == -signal.SIGKILL
    assert last.read_bytes() == previous.read_bytes() == good
    code, _, error = toy_run(*resume(folder), out="worse")
    assert code == 0
    assert "damaged" not in error
    same(whole, folder)


def test_finished_run_and_other_data(toy_run, whole: Path) -> None:
    before = rows(whole)
    code, _, error = toy_run(*resume(whole), out="whole")
    assert code == 0, error
    assert rows(whole) == before
    code, _, error = toy_run(*resume(whole), "--samples", 40, out="whole")
    assert code == 2
    assert "data changed" in error
    assert toy_run(*resume("auto"), out="whole")[0] == 2
    assert toy_run("--resume", "/nowhere", out="whole")[0] == 2


def test_manual_optimisation_advances_global_step(toy_run) -> None:
    code, folder, error = toy_run("--manual", "true", "--trainer.clip_grad", 0, out="manual")
    assert code == 0, error
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 18
    assert max(int(r[0]) for r in rows(folder)[1:]) == 18
    _, killed, _ = toy_run("--manual", "true", "--trainer.clip_grad", 0, "--kill_at", 9, out="manual2")
    code, _, error = toy_run("--manual", "true", "--trainer.clip_grad", 0, *resume(killed), out="manual2")
    assert code == 0, error
    same(folder, killed)


def test_non_finite_loss_names_step_and_stops(toy_run) -> None:
    code, folder, error = toy_run("--bad_at", 4, out="nan")
    assert code == 1
    assert "step 4" in error
    assert "parameter" in error
    assert manifest(folder)["status"] == "failed"
    assert "NonFiniteError" in manifest(folder)["error"]


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").exists(), reason="needs /proc as an unwritable place")
def test_unwritable_folder_is_one_line(toy_run) -> None:
    code, _, error = toy_run("--out", "/proc/nowhere")
    assert code == 2
    assert error.count("\n") == 1
    assert "--out" in error
