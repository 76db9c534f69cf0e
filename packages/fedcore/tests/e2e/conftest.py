"""A trained run, and ``fed-train`` in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fedcore import train as train_command
from fedcore.data import READERS
from fedcore.settings import FedConfig
from polymodal.cli import parse_config


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def fed_run(tmp_path_factory) -> Path:
    """Run folder of the smoke preset, seed 3."""
    out = tmp_path_factory.mktemp("trained")
    options = [
        "--config",
        "smoke",
        "--out",
        str(out),
        "--seed",
        "3",
        "--log.wandb",
        "off",
        "--trainer.progress",
        "none",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fed-train"])
        patch.setattr(sys, "stdout", open("/dev/null", "w"))  # noqa: PTH123
        train_command.train(parse_config(FedConfig, options, presets="fedcore", choices={"data": READERS}))
    (folder,) = (out / "fedcore").iterdir()
    return folder


@pytest.fixture
def fed_train(monkeypatch, capsys, tmp_path) -> Callable[..., Result]:
    """``fed-train`` in this process; runs go to ``tmp_path / "runs"``, W&B is off."""
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))  # put back after the command
    monkeypatch.delenv("POLYMODAL_SHARED_RUN", raising=False)
    quiet = ["--log.wandb", "off", "--trainer.progress", "none"]

    def call(*arguments: object) -> Result:
        out = [] if "--out" in arguments else ["--out", tmp_path / "runs"]
        monkeypatch.setattr(sys, "argv", ["fed-train", *map(str, [*arguments, *quiet, *out])])
        capsys.readouterr()
        code = train_command.main()
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def only_run(tmp_path) -> Callable[[], Path]:
    """The one run folder that a test made."""

    def find() -> Path:
        (folder,) = (tmp_path / "runs" / "fedcore").iterdir()
        return folder

    return find


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
