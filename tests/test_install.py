"""Each wheel alone in a fresh environment; where there are commands: help, a preset by name, the smallest run."""

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
    return folder


ALONE = [
    ("slt", "slt-train", "csl_daily_qa", "ssaw"),
    ("css", "css-train", "voc_15-1", "eir"),
    ("fedcore", "fed-train", "fedswa_cifar100", "fedmoswa"),
    ("missing_modal", "mm-train", "hatememes", "dcp"),
]


def distribution(module: str) -> str:
    return f"polymodal-{module.replace('_', '-')}"


@pytest.mark.parametrize(("module", "command", "preset", "method"), ALONE)
def test_installs_and_runs_alone(
    environment: Path, module: str, command: str, preset: str, method: str, tmp_path: Path
) -> None:
    call("uv", "venv", tmp_path / "venv", cwd=tmp_path)
    programs = tmp_path / "venv" / "bin"
    options = ("--python", programs / "python", "--find-links", environment / "dist")
    call("uv", "pip", "install", *options, distribution(module), cwd=tmp_path)
    installed = call("uv", "pip", "list", "--python", programs / "python", cwd=tmp_path)
    ours = {line.split()[0] for line in installed.splitlines() if line.startswith("polymodal")}
    assert ours == {"polymodal", distribution(module)}
    assert "pytest" not in installed
    train = programs / command
    assert "--data" in call(train, "--help", cwd=tmp_path)
    assert "class_path" in call(train, "--config", preset, "--print_config", cwd=tmp_path)
    home = {"HOME": str(tmp_path), "POLYMODAL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    output = call(train, "--config", "smoke", cwd=tmp_path, **home)
    assert "run folder" in output
    assert "wandb sync" in output
    assert method in call(programs / "polymodal", "report", "runs", cwd=tmp_path, **home)


def test_vlm_accel_benches_alone(environment: Path, tmp_path: Path) -> None:
    call("uv", "venv", tmp_path / "venv", cwd=tmp_path)
    programs = tmp_path / "venv" / "bin"
    options = ("--python", programs / "python", "--find-links", environment / "dist")
    call("uv", "pip", "install", *options, "polymodal-vlm-accel", cwd=tmp_path)
    installed = call("uv", "pip", "list", "--python", programs / "python", cwd=tmp_path)
    ours = {line.split()[0] for line in installed.splitlines() if line.startswith("polymodal")}
    assert ours == {"polymodal", "polymodal-vlm-accel"}
    for command in ("vlm-generate", "vlm-show"):
        assert "--images" in call(programs / command, "--help", cwd=tmp_path)
    assert "schedule: ov_image" in call(programs / "vlm-bench", "--config", "ov_image", "--print_config", cwd=tmp_path)
    home = {"HOME": str(tmp_path), "POLYMODAL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    assert "run folder" in call(programs / "vlm-bench", "--config", "smoke", cwd=tmp_path, **home)
    assert "lightvlm" in call(programs / "vlm-generate", "--list-methods", cwd=tmp_path, **home)


@pytest.mark.parametrize("module", ["polymodal"])
def test_others_install_alone(environment: Path, module: str, tmp_path: Path) -> None:
    call("uv", "venv", tmp_path / "venv", cwd=tmp_path)
    programs = tmp_path / "venv" / "bin"
    options = ("--python", programs / "python", "--find-links", environment / "dist")
    call("uv", "pip", "install", *options, module, cwd=tmp_path)
    installed = call("uv", "pip", "list", "--python", programs / "python", cwd=tmp_path)
    ours = {line.split()[0] for line in installed.splitlines() if line.startswith("polymodal")}
    assert ours == {module}
    code = f"import {module}, pathlib; print(pathlib.Path({module}.__file__).parent)"
    found = Path(call(programs / "python", "-c", code, cwd=tmp_path).strip())
    assert found.is_relative_to(tmp_path), "imported from the wheel, not from the checkout"
    assert module in call(programs / "polymodal", "list", cwd=tmp_path) or module == "polymodal"
