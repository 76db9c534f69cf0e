"""Fixtures of the shared layer's tests: the toy command in forked processes."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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

    def call(*arguments: object, out: str = "runs") -> tuple[int, Path | None, str]:
        folder = tmp_path / out
        log = tmp_path / "stderr.txt"
        argv = ["--out", str(folder), "--log.wandb", "off", *map(str, arguments)]

        def child() -> None:
            with log.open("w") as handle:
                os.dup2(handle.fileno(), 2)
                sys.stderr = handle
                sys.stdout = Path(os.devnull).open("w")
                code = toy.command(toy.main, toy.ToyConfig, prog="toy-train", argv=argv)
                handle.flush()
                os._exit(code)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(120)
        assert process.exitcode is not None, "the toy run hangs"
        folders = sorted((folder / "toy").glob("*/")) if folder.exists() else []
        return process.exitcode, (folders[-1] if folders else None), log.read_text()

    return call
