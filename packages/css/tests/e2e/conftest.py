"""A trained run, step folders of networks that nobody trained, and the commands in this process."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from css import data_command, evaluate, predict_command
from css import train as train_command
from css.data import READERS
from css.methods import METHODS
from css.models.build import build_network
from css.settings import CSSConfig, NetworkConfig
from css.steps import save_weights
from css.task import Task
from css.train import train
from polymodal.cli import parse_config

TINY = NetworkConfig(name="tiny", width=8)


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
    """Cache folder of all tests here, so that the shapes world is written once."""
    return tmp_path_factory.mktemp("css-cache")


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(cache))


@pytest.fixture(scope="session")
def layouts() -> ModuleType:
    """The generators of data sets in the official layouts, ``_layouts.py``."""
    spec = importlib.util.spec_from_file_location("css_e2e_layouts", Path(__file__).parents[1] / "_layouts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def css_run(cache, tmp_path_factory) -> Path:
    """Run folder of the smoke preset: task 2-1 with EIR on a small shapes world."""
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
        patch.setenv("POLYMODAL_CACHE", str(cache))
        patch.setattr(sys, "argv", ["css-train"])
        patch.setattr(sys, "stdout", open("/dev/null", "w"))  # noqa: PTH123
        train(parse_config(CSSConfig, options, presets="css", choices={"data": READERS}))
    (folder,) = (out / "css").iterdir()
    return folder


@pytest.fixture
def untrained(tmp_path) -> Callable[..., Path]:
    """Makes a step folder with a random network that gives every class somewhere."""

    def make(data, task: Task, step: int, *, method="ft", name="untrained", crop=32, **more) -> Path:
        folder = tmp_path / name
        channels = [len(ids) for ids in task.steps[: step + 1]]
        torch.manual_seed(5)
        net = build_network(TINY, channels, method=METHODS.create(method))
        with torch.no_grad():
            for head in net.heads:
                head.weight.normal_(0, 3)
        meta = {
            "task": task.name,
            "report_task": task.name,
            "num_classes": task.num_classes,
            "order": list(task.order),
            "setting": "overlap",
            "step": step,
            "channels": channels,
            "method": method,
            "method_options": {},
            "network": {"name": "tiny", "width": 8},
            "class_names": data.class_names(),
            "crop": crop,
            "data": data.name,
            "fingerprint": data.fingerprint(),
        }
        save_weights(folder / "weights.safetensors", net.state_dict(), meta | more)
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
def css_train(monkeypatch, capsys, tmp_path) -> Callable[..., Result]:
    """``css-train`` in this process; runs go to ``tmp_path / "runs"``, W&B is off."""
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))  # put back after the command
    monkeypatch.delenv("POLYMODAL_SHARED_RUN", raising=False)
    call = _caller(train_command.main, "css-train", monkeypatch, capsys)
    quiet = ["--log.wandb", "off", "--trainer.progress", "none"]
    return lambda *arguments: call(*arguments, *quiet, *([] if "--out" in arguments else ["--out", tmp_path / "runs"]))


@pytest.fixture
def css_eval(monkeypatch, capsys, tmp_path) -> Callable[..., Result]:
    """``css-eval`` in this process; runs go to ``tmp_path / "out"``, W&B is off."""
    call = _caller(evaluate.main, "css-eval", monkeypatch, capsys)
    return lambda *arguments: call(*arguments, "--out", tmp_path / "out", "--log.wandb", "off")


@pytest.fixture
def css_predict(monkeypatch, capsys) -> Callable[..., Result]:
    """``css-predict`` in this process."""
    return _caller(predict_command.main, "css-predict", monkeypatch, capsys)


@pytest.fixture
def css_data(monkeypatch, capsys) -> Callable[..., Result]:
    """``css-data`` in this process."""
    return _caller(data_command.main, "css-data", monkeypatch, capsys)


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
