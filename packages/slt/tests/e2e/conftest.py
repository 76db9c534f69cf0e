"""A trained run and runs of untrained models, for the commands that start from a checkpoint."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from polymodal.cli import parse_config
from polymodal.config import to_yaml
from polymodal.testing import QUIET, Result, as_command, folder_of
from slt import evaluate, translate
from slt import train as train_command
from slt.data import READERS
from slt.settings import SLTConfig
from slt.train import build_module, make_tokenizer, train

# Weights so large that an untrained model says something else about every clip.
LIVELY = ["--model.init_std", "0.125", "--model.position_std", "0.5", "--model.scale_embedding", "true"]


@pytest.fixture(autouse=True)
def surroundings(one_thread, use_cache) -> None:
    """Of every test here: one thread, one cache folder."""


@pytest.fixture(scope="session")
def layouts() -> ModuleType:
    """The generators of data sets in the official layouts, ``_layouts.py``."""
    spec = importlib.util.spec_from_file_location("slt_e2e_layouts", Path(__file__).with_name("_layouts.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Folder for small synthetic worlds."""
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="session")
def settings(world) -> Callable[..., SLTConfig]:
    """The smoke preset on a world of 12/6/6 clips, with further options."""

    def parse(*options: str) -> SLTConfig:
        arguments = ["--config", "smoke", "--data.sizes", "[12, 6, 6]", "--data.root", str(world), "--stage", "2"]
        arguments += [*LIVELY, *QUIET, *options]
        return parse_config(SLTConfig, arguments, presets="slt", choices={"data": READERS})

    return parse


@pytest.fixture(scope="session")
def trained_run(cache_folder, settings, tmp_path_factory) -> Path:
    """Run folder of a model trained for one epoch, with its question-only probe."""
    out = tmp_path_factory.mktemp("trained")
    with as_command("slt-train", POLYMODAL_CACHE=str(cache_folder)):
        train(settings("--out", str(out / "runs"), "--seed", "3"))
    return folder_of(out)


@pytest.fixture
def untrained_run(tmp_path) -> Callable[[SLTConfig], Path]:
    """Makes a run folder around a model that nobody trained: what slt-train leaves, without the time."""

    def make(config: SLTConfig, name: str = "run") -> Path:
        folder = tmp_path / "runs" / "slt" / name
        (folder / "checkpoints").mkdir(parents=True)
        tokenizer = make_tokenizer(config)
        module = build_module(config, tokenizer, stage=2)
        checkpoint = {"state_dict": module.state_dict()}
        module.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, folder / "checkpoints" / "best.ckpt")
        tokenizer.save(folder / "tokenizer")
        (folder / "config.yaml").write_text(to_yaml(config))
        manifest = {"schema": "polymodal.run", "schema_version": 1, "task": "slt", "job_type": "train"}
        manifest |= {"method": config.model.fusion, "data": config.data.describe(), "seed": config.seed}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return make


@pytest.fixture
def slt_train(call_training) -> Callable[..., Result]:
    """``slt-train`` in this process; runs go to ``tmp_path / "runs"``, W&B is off."""
    return partial(call_training, train_command.main, "slt-train")


@pytest.fixture
def slt_eval(call_command, tmp_path) -> Callable[..., Result]:
    """``slt-eval`` in this process; runs go to ``tmp_path / "out"``, W&B is off."""
    return partial(call_command, evaluate.main, "slt-eval", "--out", tmp_path / "out", "--log.wandb", "off")


@pytest.fixture
def slt_translate(call_command) -> Callable[..., Result]:
    """``slt-translate`` in this process."""
    return partial(call_command, translate.main, "slt-translate")
