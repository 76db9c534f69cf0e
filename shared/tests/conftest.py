"""Fixtures of the shared layer's tests: the toy command in forked processes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from polymodal.forked import run_forked

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def toy():
    """The module of toy_train.py, with torch and lightning imported so that forks start at once."""
    import lightning  # noqa: F401
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("polymodal_toy_train", HERE / "toy_train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["polymodal_toy_train"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toy_run(toy, tmp_path: Path) -> Callable[..., tuple[int, Path, str]]:
    """Run the toy command in a forked process; returns exit code (negative: signal), newest run folder, stderr."""

    def call(*arguments: object, out: str = "toys") -> tuple[int, Path | None, str]:
        def main() -> int:
            return toy.command(toy.main, toy.ToyConfig, prog="toy-train")

        options = ["--log.wandb", "off", *arguments]
        code, error = run_forked(main, ["toy-train", *options], tmp_path / out)
        folders = sorted((tmp_path / out / "runs" / "toy").glob("*/"))
        return code, (folders[-1] if folders else None), error

    return call
