"""Runs killed at the moments that matter end like the run that nobody killed: a method whose clients keep state."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import lightning  # noqa: F401  # imported here, so that forks start at once
import pytest
import torch
from fedcore import landscape, module, simulation, state_shards, train
from polymodal.callbacks import load_checkpoint
from polymodal.forked import Patch, at_call, half_a_row, interrupt, kill_and_resume, run_forked
from polymodal.testing import assert_same_results, folder_of, manifest, rows
from safetensors.torch import load_file

PROGRAM = Path(sys.executable).parent / "fed-train"
OPTIONS = ["--config", "smoke", "--algorithm", "scaffold", "--rounds", "6", "--model.options", "{hidden: [6]}"]
OPTIONS += ["--federation.flatness", "20", "--federation.eval_every", "2", "--log.wandb", "off"]
OPTIONS += ["--trainer.progress", "none"]
SERIAL = ["--engine", "serial"]


def fed_train(out: Path, *arguments: object, patch: Patch = lambda: None) -> tuple[int, str]:
    """The command in a forked process that ``patch`` prepares; exit code (negative: signal) and stderr."""
    return run_forked(train.main, ["fed-train", *arguments], out, patch)


def last(run: Path) -> dict:
    return load_checkpoint(run / "checkpoints" / "last.ckpt")["fedcore"]


def client_states(run: Path) -> dict[str, torch.Tensor]:
    """The newest state of every client, by ``client/name``."""
    kept = last(run)["client_states"]["shard_of"]
    files = {name: load_file(run / "checkpoints" / "clients" / name) for name in set(kept.values())}
    return {key: files[kept[i]][key] for i in kept for key in files[kept[i]] if key.startswith(f"{i}/")}


def same(whole: Path, killed: Path) -> None:
    """Bit for bit: server, clients, totals, rows, pictures."""
    assert_same_results(whole, killed)
    left, right = last(whole), last(killed)
    for tree in (lambda e: {"flat": e["simulation"]["flat"]}, lambda e: e["simulation"]["server"]):
        assert tree(left).keys() == tree(right).keys()
        assert all(torch.equal(value, tree(right)[name]) for name, value in tree(left).items())
    assert left["totals"] == right["totals"]
    states, others = client_states(whole), client_states(killed)
    assert states, "the method keeps states"
    assert states.keys() == others.keys()
    assert all(torch.equal(value, others[key]) for key, value in states.items())
    table = "samples/client-metrics.jsonl"
    assert (killed / table).read_text() == (whole / table).read_text()
    names = {path.name for path in (whole / "figures").iterdir()}
    assert names == {path.name for path in (killed / "figures").iterdir()}
    assert all((killed / "figures" / name).read_bytes() == (whole / "figures" / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    code, error = fed_train(out, *OPTIONS, *SERIAL)
    assert code == 0, error
    return folder_of(out)


# ------------------------------------------------------------------ moments


ROUND = (simulation.Simulation, "round")
MOMENTS: dict[str, Patch] = {
    "before round 1": at_call(*ROUND, 1),
    "in round 1": at_call(simulation, "Reducer", 1),
    "after round 2, not saved": at_call(*ROUND, 2, after=True),
    "before round 3": at_call(*ROUND, 3),
    "in round 4": at_call(simulation.Simulation, "cohort", 9),
    "in the evaluation of round 4": at_call(simulation.Simulation, "evaluate", 3),
    "states of round 3 half written": at_call(state_shards, "write_bytes", 3),
    "states of round 3 without a checkpoint": at_call(state_shards, "write_bytes", 3, after=True),
    "old states not deleted yet": at_call(state_shards.StateShards, "_delete_others", 4),
    "checkpoint of round 4 half written": at_call(torch, "save", 7),
    "half a row of metrics": half_a_row(4, 3),
    "in the last round": at_call(*ROUND, 6, after=True),
    "before the test": at_call(module.FederatedModule, "test_step", 1),
    "in the landscape": at_call(landscape, "hessian_product", 2),
}
FAST = {"states of round 3 without a checkpoint", "half a row of metrics"}


@pytest.mark.parametrize("moment", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS])
def test_killed_and_resumed(whole: Path, tmp_path: Path, moment: str) -> None:
    code, error = fed_train(tmp_path, *OPTIONS, *SERIAL, patch=MOMENTS[moment])
    assert code == -signal.SIGKILL, error
    killed = folder_of(tmp_path)
    assert manifest(killed)["status"] == "running"
    by_name = [] if moment in FAST else [*OPTIONS, *SERIAL]  # a run folder brings its own configuration
    code, error = fed_train(tmp_path, *by_name, "--resume", "auto" if by_name else killed)
    assert code == 0, error
    same(whole, killed)
    assert len(manifest(killed)["resumed"]) == 1
    assert not list(killed.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("every", [2, 4])
def test_killed_between_checkpoints(whole: Path, tmp_path: Path, every: int) -> None:
    cadence = ["--trainer.checkpoint_every_epochs", every]
    code, error = fed_train(tmp_path, *OPTIONS, *SERIAL, *cadence, patch=at_call(*ROUND, 6))
    assert code == -signal.SIGKILL, error
    killed = folder_of(tmp_path)
    assert last(killed)["round"] == 4
    code, error = fed_train(tmp_path, "--resume", killed)
    assert code == 0, error
    same(whole, killed)


@pytest.mark.slow
def test_killed_again_and_again(whole: Path, tmp_path: Path) -> None:
    patches = [
        at_call(*ROUND, 2),
        at_call(state_shards, "write_bytes", 1, after=True),
        at_call(torch, "save", 2),
        at_call(*ROUND, 2, after=True),
        at_call(landscape, "hessian_product", 1),
    ]
    assert fed_train(tmp_path, *OPTIONS, *SERIAL, patch=patches[0])[0] == -signal.SIGKILL
    for patch in patches[1:]:
        code, error = fed_train(tmp_path, *OPTIONS, *SERIAL, "--resume", "auto", patch=patch)
        assert code == -signal.SIGKILL, error
    code, error = fed_train(tmp_path, *OPTIONS, *SERIAL, "--resume", "auto")
    assert code == 0, error
    same(whole, folder_of(tmp_path))
    assert len(manifest(folder_of(tmp_path))["resumed"]) == len(patches)


def test_a_damaged_checkpoint_falls_back_on_the_one_before(whole: Path, tmp_path: Path) -> None:
    code, error = fed_train(tmp_path, *OPTIONS, *SERIAL, patch=at_call(*ROUND, 5))
    assert code == -signal.SIGKILL, error
    killed = folder_of(tmp_path)
    path = killed / "checkpoints" / "last.ckpt"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = bytes(500)
    path.write_bytes(content)
    code, error = fed_train(tmp_path, "--resume", killed)
    assert code == 0, error
    assert "is damaged" in error
    assert "going on from previous.ckpt (step 3)" in error
    same(whole, killed)


@pytest.mark.slow
def test_other_engines_have_the_same_bits_and_may_go_on(whole: Path, tmp_path: Path) -> None:
    pool = ["--engine", "pool", "--federation.workers", "2"]
    code, error = fed_train(tmp_path / "pool", *OPTIONS, *pool)
    assert code == 0, error
    same(whole, folder_of(tmp_path / "pool"))
    assert manifest(folder_of(tmp_path / "pool"))["engine"] == "pool"
    code, error = fed_train(tmp_path / "both", *OPTIONS, *SERIAL, patch=at_call(*ROUND, 4))
    assert code == -signal.SIGKILL, error
    code, error = fed_train(tmp_path / "both", "--resume", folder_of(tmp_path / "both"), *pool)
    assert code == 0, error
    same(whole, folder_of(tmp_path / "both"))


METHODS = {
    "fedmoswa on disk": ["--algorithm", "fedmoswa", "--federation.state_memory_mib", "0"],
    "fedadamw": ["--algorithm", "fedadamw", "--lr", "0.01"],
    "fedmuon": ["--algorithm", "fedmuon", "--lr", "0.001"],
    "server_swa": ["--algorithm", "server_swa"],
    "best model": ["--federation.test_with", "best", "--lr", "2"],
    "early stop": ["--trainer.patience", "1", "--rounds", "20", "--lr", "2"],
    "dropout and augmentation": ["--model.options", "{hidden: [6]}", "--partition", "dirichlet_label"],
}


@pytest.mark.slow
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_other_methods_too(tmp_path: Path, options: list[str]) -> None:
    for name in ("whole", "killed"):
        patch = at_call(*ROUND, 3) if name == "killed" else lambda: None
        code, error = fed_train(tmp_path / name, *OPTIONS, *SERIAL, *options, patch=patch)
        assert code == (-signal.SIGKILL if name == "killed" else 0), error
    killed, expected = folder_of(tmp_path / "killed"), folder_of(tmp_path / "whole")
    code, error = fed_train(tmp_path / "killed", "--resume", killed)
    assert code == 0, error
    assert rows(killed) == rows(expected)
    assert manifest(killed)["metrics"] == manifest(expected)["metrics"]
    assert torch.equal(last(killed)["simulation"]["flat"], last(expected)["simulation"]["flat"])


# ------------------------------------------------------------------ Ctrl-C

STOPS: dict[str, tuple[Patch, str]] = {
    "in a round": (at_call(*ROUND, 3, interrupt), "saved after round 3"),
    "in an evaluation": (at_call(simulation.Simulation, "evaluate", 2, interrupt), "saved after round 2"),
    "in the landscape": (at_call(landscape, "hessian_product", 1, interrupt), "interrupted"),
    "twice in a round": (at_call(*ROUND, 3, lambda: (interrupt(), interrupt())), "interrupted"),
}


@pytest.mark.parametrize(
    "moment", [name if name == "in a round" else pytest.param(name, marks=pytest.mark.slow) for name in STOPS]
)
def test_ctrl_c_says_how_to_go_on(whole: Path, tmp_path: Path, moment: str) -> None:
    patch, what = STOPS[moment]
    code, error = fed_train(tmp_path, *OPTIONS, *SERIAL, patch=patch)
    stopped = folder_of(tmp_path)
    assert code == 130, error
    assert error.strip().splitlines()[-1] == f"fed-train: {what}; continue with --resume {stopped}"
    assert "Traceback" not in error
    assert manifest(stopped)["status"] == "interrupted"
    code, error = fed_train(tmp_path, "--resume", stopped)
    assert code == 0, error
    same(whole, stopped)


# ------------------------------------------------------------------ processes


@pytest.mark.slow
def test_the_console_script_killed_at_any_moment(whole: Path, tmp_path: Path) -> None:
    """As it happens to users: SIGKILL from outside, whenever; then ``--resume auto``."""
    for step in (1, 4):
        out = tmp_path / str(step)
        kill_and_resume([PROGRAM, *OPTIONS, *SERIAL], out, step)
        same(whole, folder_of(out))
