"""Runs on adapters that were killed end like the run that nobody killed: base, factors, variates, moved weights."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import lightning  # noqa: F401  # imported here, so that forks start at once
import pytest
import torch
from fedcore import simulation, train
from fedcore.lora import job
from polymodal.callbacks import load_checkpoint
from polymodal.forked import Patch, at_call, run_forked
from polymodal.testing import assert_same_results, folder_of, manifest
from safetensors.torch import load_file

OPTIONS = ["--lora.ranks", "2,4", "--rounds", "4", "--clients", "3", "--model.options", "{hidden: [12, 8]}"]
OPTIONS += ["--lora.pretrain_epochs", "2", "--federation.flatness", "0", "--federation.client_samples", "20"]
OPTIONS += ["--lora.dropout", "0.1", "--engine", "serial", "--log.wandb", "off", "--trainer.progress", "none"]
METHODS = {
    "ilora": ["--algorithm_options", "{residual: drop, cv: true}"],
    "ilora, moved base": ["--algorithm_options", "{residual: fold, cv: true}"],
    "flora": ["--algorithm", "flora"],
    "rolora": ["--algorithm", "rolora", "--lora.ranks", "3"],
    "hetlora": ["--algorithm", "hetlora"],
}
FAST = ("ilora, moved base",)


def fed_train(out: Path, *arguments: object, patch: Patch = lambda: None) -> tuple[int, str]:
    """The command in a forked process that ``patch`` prepares; exit code (negative: signal) and stderr."""
    return run_forked(train.main, ["fed-train", *arguments], out, patch)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Everything that a run keeps: server, clients, model, base, what it leaves for others."""
    checkpoint = load_checkpoint(run / "checkpoints" / "last.ckpt")
    state, kept = checkpoint["fedcore"]["simulation"], checkpoint["fedcore"]["client_states"]["shard_of"]
    found = {"flat": state["flat"], **{f"server {k}": v for k, v in state["server"].items()}}
    found |= {f"model {name}": value for name, value in checkpoint["state_dict"].items()}
    for file in {run / "checkpoints" / "clients" / name for name in kept.values()}:
        newest = {str(client) for client, name in kept.items() if name == file.name}
        found |= {f"client {k}": v for k, v in load_file(file).items() if k.partition("/")[0] in newest}
    for file in ("base", "adapter/adapter_model", "merged/model"):
        if (run / f"{file}.safetensors").is_file():
            found |= {f"{file} {name}": value for name, value in load_file(run / f"{file}.safetensors").items()}
    return found


def same(whole: Path, killed: Path) -> None:
    """Bit for bit."""
    assert_same_results(whole, killed)
    assert manifest(killed)["data"] == manifest(whole)["data"]
    left, right = tensors(whole), tensors(killed)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[str], Path]:
    """The run of a method that nobody killed."""
    known: dict[str, Path] = {}

    def find(method: str) -> Path:
        if method not in known:
            out = tmp_path_factory.mktemp("whole")
            code, error = fed_train(out, *OPTIONS, *METHODS[method])
            assert code == 0, error
            known[method] = folder_of(out)
        return known[method]

    return find


ROUND = (simulation.Simulation, "round")


@pytest.mark.parametrize("method", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_killed_and_resumed(whole, tmp_path: Path, method: str) -> None:
    code, error = fed_train(tmp_path, *OPTIONS, *METHODS[method], patch=at_call(*ROUND, 3))
    assert code == -signal.SIGKILL, error
    killed = folder_of(tmp_path)
    assert manifest(killed)["status"] == "running"
    code, error = fed_train(tmp_path, "--resume", killed, patch=at_call(job, "pretrain", 1))
    assert code == 0, "the base is not trained again" + error
    same(whole(method), killed)
    kept = tensors(killed)
    assert any(name.startswith("base ") for name in kept)
    if "ilora" in method:
        assert any(name.startswith("client ") for name in kept)
    if method in ("ilora, moved base", "flora"):
        assert any(name.startswith("server ") for name in kept)


MOMENTS = {
    "before the base is kept": at_call(job, "keep_base", 1),
    "while the base is written": at_call(job, "write_bytes", 1),
    "before round 1": at_call(*ROUND, 1),
    "before the adapter is written": at_call(job, "export", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_other_moments(whole, tmp_path: Path, moment: str) -> None:
    code, error = fed_train(tmp_path, *OPTIONS, *METHODS["ilora"], patch=MOMENTS[moment])
    assert code == -signal.SIGKILL, error
    killed = folder_of(tmp_path)
    code, error = fed_train(tmp_path, *OPTIONS, *METHODS["ilora"], "--resume", "auto")
    assert code == 0, error
    same(whole("ilora"), killed)


@pytest.mark.slow
def test_the_pool_has_the_same_bits(whole, tmp_path: Path) -> None:
    pool = ["--engine", "pool", "--federation.workers", "2"]
    code, error = fed_train(tmp_path, *OPTIONS, *METHODS["ilora, moved base"], *pool)
    assert code == 0, error
    same(whole("ilora, moved base"), folder_of(tmp_path))
