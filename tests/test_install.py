"""polymodal-slt's wheel alone in a fresh environment: help, a preset by name, the smallest run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")]


def call(*command: object, cwd: Path, **environment: str) -> str:
    base = {k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL_ENV", "PYTHON", "WANDB"))}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=base | environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("install")
    call("uv", "build", "--all-packages", "--out-dir", folder / "dist", cwd=ROOT)
    names = {p.name.split("-")[0] for p in (folder / "dist").glob("*.whl")}
    assert names == {
        *("polymodal", "polymodal_slt", "polymodal_css", "polymodal_fedcore"),
        *("polymodal_vlm_accel", "polymodal_missing_modal"),
    }
    call("uv", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    call("uv", "pip", "install", "--python", python, "--find-links", folder / "dist", "polymodal-slt", cwd=folder)
    return folder


def test_slt_installs_and_runs_alone(environment: Path) -> None:
    programs = environment / "venv" / "bin"
    installed = call("uv", "pip", "list", "--python", programs / "python", cwd=environment)
    assert "polymodal-slt" in installed
    assert "polymodal-css" not in installed
    assert "pytest" not in installed
    assert "--data" in call(programs / "slt-train", "--help", cwd=environment)
    assert "class_path" in call(programs / "slt-train", "--config", "csl_daily_qa", "--print_config", cwd=environment)
    home = {"HOME": str(environment), "POLYMODAL_CACHE": str(environment / "cache"), "OMP_NUM_THREADS": "1"}
    output = call(programs / "slt-train", "--config", "smoke", cwd=environment, **home)
    assert "run folder" in output
    assert "wandb sync" in output
    report = call(programs / "polymodal", "report", "runs", cwd=environment, **home)
    assert "ssaw" in report
