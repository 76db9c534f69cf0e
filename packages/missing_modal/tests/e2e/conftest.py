"""A trained run, and the commands in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from missing_modal import train as train_command
from missing_modal.data import READERS
from missing_modal.settings import MMConfig
from missing_modal.train import train
from polymodal.cli import parse_config

SMALL = ["--data.sizes", "[192, 96, 128]", "--backbone.steps", "8", "--backbone.width", "8", "--backbone.features", "4"]
"""Options of a world and encoders that train in a second."""


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Cache folder of all tests here, so that small encoders are trained once."""
    return tmp_path_factory.mktemp("missing-modal-cache")


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(cache))


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Options of a world and encoders that train in a second."""
    return list(SMALL)


@pytest.fixture(scope="session")
def mm_run(cache, tmp_path_factory) -> Path:
    """Run folder of DCP on a small world, two epochs."""
    out = tmp_path_factory.mktemp("trained")
    options = ["--config", "world", *SMALL, "--out", str(out), "--seed", "3", "--trainer.max_epochs", "2"]
    options += ["--log.wandb", "off", "--trainer.progress", "none", "--loader.eval_batch_size", "50"]
    options += ["--trainer.log_every_steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYMODAL_CACHE", str(cache))
        patch.setattr(sys, "argv", ["mm-train"])
        patch.setattr(sys, "stdout", open("/dev/null", "w"))  # noqa: PTH123
        train(parse_config(MMConfig, options, presets="missing_modal", choices={"data": READERS}))
    (folder,) = (out / "missing_modal").iterdir()
    return folder


@pytest.fixture
def mm_train(monkeypatch, capsys, tmp_path) -> Callable[..., Result]:
    """``mm-train`` in this process; runs go to ``tmp_path / "runs"``, W&B is off."""
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))  # put back after the command
    monkeypatch.delenv("POLYMODAL_SHARED_RUN", raising=False)
    quiet = ["--log.wandb", "off", "--trainer.progress", "none"]

    def call(*arguments: object) -> Result:
        out = [] if "--out" in arguments else ["--out", tmp_path / "runs"]
        monkeypatch.setattr(sys, "argv", ["mm-train", *map(str, [*arguments, *quiet, *out])])
        capsys.readouterr()
        code = train_command.main()
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def complains() -> Callable[..., str]:
    """Asserts exit code 2 and one line of error, the last, with all the given parts; returns the line."""

    def check(result: Result, *parts: str) -> str:
        assert result.code == 2, result
        assert "Traceback" not in result.err
        lines = [line for line in result.err.splitlines() if ": error: " in line]
        assert len(lines) == 1, result.err
        assert result.err.rstrip().endswith(lines[0])
        for part in parts:
            assert part in lines[0], (part, lines[0])
        return lines[0]

    return check
