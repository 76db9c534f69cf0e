"""Imports point down only: packages meet by interface, and light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("fedcore", "vlm_accel", "slt", "css", "missing_modal")
SOURCES = {name: ROOT / "packages" / name / "src" / name for name in PACKAGES} | {
    "polymodal": ROOT / "shared" / "src" / "polymodal"
}


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", SOURCES)
def test_no_package_imports_a_sibling(package: str) -> None:
    files = list(SOURCES[package].rglob("*.py"))
    assert files
    for file in files:
        assert not imported(file) & (set(PACKAGES) - {package}), file


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("slt", "torch transformers lightning wandb"),
        ("slt.settings", "torch transformers lightning wandb"),
        ("slt.data", "torch transformers lightning wandb"),
        ("slt.train", "torch transformers lightning wandb"),
        ("slt.methods.ssaw", "lightning wandb transformers polymodal.trainer"),
        ("slt.ops.contrastive", "lightning wandb transformers polymodal.trainer"),
        ("slt.metrics", "torch lightning wandb transformers"),
        ("polymodal.cli", "torch lightning wandb"),
        ("polymodal.main", "torch lightning wandb"),
    ],
)
def test_light_modules_stay_light(module: str, banned: str) -> None:
    code = f"import sys, {module}; found = [m for m in {banned.split()!r} if m in sys.modules]; assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
