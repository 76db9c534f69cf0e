"""A trained run, and ``fed-train`` in this process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from fedcore import train as train_command
from fedcore.data import READERS
from fedcore.settings import FedConfig
from polymodal.cli import parse_config
from polymodal.testing import QUIET, Result, as_command, folder_of


@pytest.fixture(autouse=True)
def surroundings(one_thread) -> None:
    """Of every test here: one thread."""


@pytest.fixture(scope="session")
def fed_run(tmp_path_factory) -> Path:
    """Run folder of the smoke preset, seed 3."""
    out = tmp_path_factory.mktemp("trained")
    options = ["--config", "smoke", "--out", str(out / "runs"), "--seed", "3", *QUIET]
    with as_command("fed-train"):
        train_command.train(parse_config(FedConfig, options, presets="fedcore", choices={"data": READERS}))
    return folder_of(out)


@pytest.fixture
def fed_train(call_training) -> Callable[..., Result]:
    """``fed-train`` in this process; runs go to ``tmp_path / "runs"``, W&B is off."""
    return partial(call_training, train_command.main, "fed-train")
