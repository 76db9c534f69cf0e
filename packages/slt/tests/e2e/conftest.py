"""A trained run and runs of untrained models, for the commands that start from a checkpoint."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from polymodal.cli import parse_config
from polymodal.config import to_yaml
from slt import evaluate, translate
from slt.data import READERS
from slt.settings import SLTConfig
from slt.train import build_module, make_tokenizer, train

# Weights so large that an untrained model says something else about every clip.
LIVELY = ["--model.init_std", "0.125", "--model.position_std", "0.5", "--model.scale_embedding", "true"]


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


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path_factory.getbasetemp() / "slt-cache"))


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
        arguments += [*LIVELY, "--log.wandb", "off", "--trainer.progress", "none", *options]
        return parse_config(SLTConfig, arguments, presets="slt", choices={"data": READERS})

    return parse


@pytest.fixture(scope="session")
def trained_run(settings, tmp_path_factory) -> Path:
    """Run folder of a model trained for one epoch, with its question-only probe."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["slt-train"])
        patch.setattr(sys, "stdout", open("/dev/null", "w"))  # noqa: PTH123
        train(settings("--out", str(out), "--seed", "3"))
    (folder,) = (out / "slt").iterdir()
    return folder


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


def _caller(main, name, monkeypatch, capsys) -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        code = main()
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def slt_eval(monkeypatch, capsys, tmp_path) -> Callable[..., Result]:
    """``slt-eval`` in this process; runs go to ``tmp_path / "out"``, W&B is off."""
    call = _caller(evaluate.main, "slt-eval", monkeypatch, capsys)
    return lambda *arguments: call("--out", tmp_path / "out", "--log.wandb", "off", *arguments)


@pytest.fixture
def slt_translate(monkeypatch, capsys) -> Callable[..., Result]:
    """``slt-translate`` in this process."""
    return _caller(translate.main, "slt-translate", monkeypatch, capsys)


@pytest.fixture
def complains() -> Callable[..., str]:
    """Asserts exit code 2 and one line of error with all the given parts; returns the line."""

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
