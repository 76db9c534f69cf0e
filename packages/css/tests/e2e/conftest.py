"""A trained run, step folders of networks that nobody trained, and the commands in this process."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
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
from polymodal.testing import QUIET, Result, as_command, folder_of

TINY = NetworkConfig(name="tiny", width=8)


@pytest.fixture(autouse=True)
def surroundings(one_thread, use_cache) -> None:
    """Of every test here: one thread, one cache folder."""


@pytest.fixture(scope="session")
def layouts() -> ModuleType:
    """The generators of data sets in the official layouts, ``_layouts.py``."""
    spec = importlib.util.spec_from_file_location("css_e2e_layouts", Path(__file__).parents[1] / "_layouts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def css_run(cache_folder, tmp_path_factory) -> Path:
    """Run folder of the smoke preset: task 2-1 with EIR on a small shapes world."""
    out = tmp_path_factory.mktemp("trained")
    options = ["--config", "smoke", "--out", str(out / "runs"), "--seed", "3", *QUIET]
    with as_command("css-train", POLYMODAL_CACHE=str(cache_folder)):
        train(parse_config(CSSConfig, options, presets="css", choices={"data": READERS}))
    return folder_of(out)


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


@pytest.fixture
def css_train(call_training) -> Callable[..., Result]:
    """``css-train`` in this process; runs go to ``tmp_path / "runs"``, W&B is off."""
    return partial(call_training, train_command.main, "css-train")


@pytest.fixture
def css_eval(call_command, tmp_path) -> Callable[..., Result]:
    """``css-eval`` in this process; runs go to ``tmp_path / "out"``, W&B is off."""
    call = partial(call_command, evaluate.main, "css-eval")
    return lambda *arguments: call(*arguments, "--out", tmp_path / "out", "--log.wandb", "off")


@pytest.fixture
def css_predict(call_command) -> Callable[..., Result]:
    """``css-predict`` in this process."""
    return partial(call_command, predict_command.main, "css-predict")


@pytest.fixture
def css_data(call_command) -> Callable[..., Result]:
    """``css-data`` in this process."""
    return partial(call_command, data_command.main, "css-data")
