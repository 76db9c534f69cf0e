"""Imports point down only: packages meet by interface, and light modules stay light."""

from __future__ import annotations

import ast
import re
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


@pytest.mark.parametrize("package", PACKAGES)
def test_no_test_or_experiment_needs_a_sibling(package: str) -> None:
    folder = ROOT / "packages" / package
    for file in [*(folder / "tests").rglob("*.py"), *(folder / "experiments").rglob("*.py")]:
        assert not imported(file) & (set(PACKAGES) - {package}), file


@pytest.mark.parametrize("package", SOURCES)
def test_no_package_names_a_sibling_for_a_late_import(package: str) -> None:
    targets = re.compile(rf"(?:{'|'.join(set(PACKAGES) - {package})})(?:\.\w+)+(?::\w+)?")
    for file in SOURCES[package].rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not targets.fullmatch(node.value), f"{file}:{node.lineno} {node.value}"


@pytest.mark.parametrize("package", [p for p in PACKAGES if (SOURCES[p] / "ops").is_dir()])
def test_ops_and_methods_fit_into_anyones_loop(package: str) -> None:
    files = [f for part in ("ops", "methods", "algorithms") for f in (SOURCES[package] / part).rglob("*.py")]
    names = [".".join(f.relative_to(SOURCES[package].parent).with_suffix("").parts) for f in files]
    names = [name.removesuffix(".__init__") for name in names]
    assert len(names) > 5
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
found = [m for m in ("lightning", "wandb", "transformers", "polymodal.trainer") if m in sys.modules]
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
        ("css", "torch transformers lightning wandb"),
        ("css.settings", "torch transformers lightning wandb"),
        ("css.data", "torch transformers lightning wandb"),
        ("css.train", "torch transformers lightning wandb"),
        ("css.methods.eir", "lightning wandb transformers polymodal.trainer"),
        ("css.ops.paste", "lightning wandb transformers polymodal.trainer"),
        ("css.metrics", "torch lightning wandb transformers"),
        ("fedcore", "torch transformers lightning wandb sklearn"),
        ("fedcore.settings", "torch transformers lightning wandb sklearn"),
        ("fedcore.data", "torch transformers lightning wandb sklearn"),
        ("fedcore.train", "torch transformers lightning wandb sklearn"),
        ("fedcore.algorithms", "torch lightning wandb sklearn"),
        ("fedcore.lora", "torch transformers lightning wandb peft"),
        ("fedcore.privacy", "torch lightning wandb dp_accounting"),
        ("fedcore.flower", "torch lightning wandb flwr ray"),
        ("fedcore.lora.aggregate", "lightning wandb transformers peft polymodal.trainer"),
        ("fedcore.algorithms.fedmuon", "lightning wandb transformers polymodal.trainer"),
        ("fedcore.ops.newton_schulz", "lightning wandb transformers polymodal.trainer"),
        ("vlm_accel", "torch transformers lightning wandb sklearn"),
        ("vlm_accel.methods", "torch transformers lightning wandb"),
        ("vlm_accel.schedule", "torch transformers lightning wandb"),
        ("vlm_accel.bench_command", "torch transformers lightning wandb sklearn"),
        ("vlm_accel.generate_command", "torch transformers lightning wandb sklearn"),
        ("vlm_accel.show_command", "torch transformers lightning wandb sklearn"),
        ("vlm_accel.ops", "lightning wandb transformers polymodal.trainer"),
        ("vlm_accel.methods.recycle", "lightning wandb transformers polymodal.trainer"),
        ("missing_modal", "torch transformers lightning wandb open_clip"),
        ("missing_modal.settings", "torch transformers lightning wandb open_clip"),
        ("missing_modal.train", "torch transformers lightning wandb open_clip"),
        ("missing_modal.tables", "torch transformers lightning wandb"),
        ("missing_modal.methods.dcp", "lightning wandb transformers polymodal.trainer"),
        ("polymodal.cli", "torch lightning wandb"),
        ("polymodal.main", "torch lightning wandb"),
        ("polymodal.pool", "torch lightning wandb"),
        ("polymodal.progress", "torch lightning wandb"),
        ("polymodal.devices", "torch lightning wandb"),
        ("polymodal.testing", "torch lightning wandb"),
    ],
)
def test_light_modules_stay_light(module: str, banned: str) -> None:
    code = f"import sys, {module}; found = [m for m in {banned.split()!r} if m in sys.modules]; assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
