"""A trained run, and the commands in this process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from missing_modal import evaluate as evaluate_command
from missing_modal import predict_command
from missing_modal import train as train_command
from missing_modal.data import READERS
from missing_modal.settings import MMConfig
from missing_modal.train import train
from polymodal.cli import parse_config
from polymodal.testing import QUIET, Result, as_command, folder_of

SMALL = ["--data.sizes", "[192, 96, 128]", "--backbone.steps", "8", "--backbone.width", "8", "--backbone.features", "4"]
"""Options of a world and encoders that train in a second."""


@pytest.fixture(autouse=True)
def surroundings(one_thread, use_cache) -> None:
    """Of every test here: one thread, one cache folder."""


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Options of a world and encoders that train in a second."""
    return list(SMALL)


@pytest.fixture(scope="session")
def mm_run(cache_folder, tmp_path_factory) -> Path:
    """Run folder of DCP on a small world, two epochs."""
    out = tmp_path_factory.mktemp("trained")
    options = ["--config", "world", *SMALL, "--out", str(out / "runs"), "--seed", "3", "--trainer.max_epochs", "2"]
    options += [*QUIET, "--loader.eval_batch_size", "50", "--trainer.log_every_steps", "2"]
    with as_command("mm-train", POLYMODAL_CACHE=str(cache_folder)):
        train(parse_config(MMConfig, options, presets="missing_modal", choices={"data": READERS}))
    return folder_of(out)


@pytest.fixture
def mm_train(call_training) -> Callable[..., Result]:
    """``mm-train`` in this process; runs go to ``tmp_path / "runs"``, W&B is off."""
    return partial(call_training, train_command.main, "mm-train")


@pytest.fixture
def call(call_command, tmp_path):
    """``mm-eval`` or ``mm-predict`` in this process; run folders go to ``tmp_path / "runs"``, W&B is off."""

    def run(name, *arguments):
        command = {"mm-eval": evaluate_command.main, "mm-predict": predict_command.main}[name]
        more = ["--log.wandb", "off", "--out", tmp_path / "runs"] if name == "mm-eval" else []
        return call_command(command, name, *arguments, *more)

    return run
