"""Each wheel alone in a fresh environment; for polymodal-slt help, a preset by name and the smallest run too."""

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


@pytest.mark.parametrize("module", ["polymodal", "fedcore", "vlm_accel", "css", "missing_modal"])
def test_others_install_alone(environment: Path, module: str, tmp_path: Path) -> None:
    distribution = "polymodal" if module == "polymodal" else f"polymodal-{module.replace('_', '-')}"
    call("uv", "venv", tmp_path / "venv", cwd=tmp_path)
    programs = tmp_path / "venv" / "bin"
    options = ("--python", programs / "python", "--find-links", environment / "dist")
    call("uv", "pip", "install", *options, distribution, cwd=tmp_path)
    installed = call("uv", "pip", "list", "--python", programs / "python", cwd=tmp_path)
    ours = {line.split()[0] for line in installed.splitlines() if line.startswith("polymodal")}
    assert ours == {"polymodal", distribution}
    code = f"import {module}, pathlib; print(pathlib.Path({module}.__file__).parent)"
    found = Path(call(programs / "python", "-c", code, cwd=tmp_path).strip())
    assert found.is_relative_to(tmp_path), "imported from the wheel, not from the checkout"
    assert module in call(programs / "polymodal", "list", cwd=tmp_path) or module == "polymodal"
