"""House rules that a machine can check."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def test_files_are_small() -> None:
    large = [f.name for f in tracked() if f.stat().st_size > 200 * 1024 and f.name != "uv.lock"]
    assert not large


def test_sources_are_short_and_silent() -> None:
    problems = []
    for file in tracked():
        if file.suffix != ".py":
            continue
        text = file.read_text(encoding="utf-8")
        if len(text.splitlines()) > 500:
            problems.append(f"{file.relative_to(ROOT)} has more than 500 lines")
        if "/src/" not in file.as_posix():
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > 60:
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and (node.end_lineno or 0) - body[0].lineno + 1 > 60:
                    problems.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name} has more than 60 lines")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                problems.append(f"{file.relative_to(ROOT)}:{node.lineno} prints; use logging or sys.stdout in a main")
    assert not problems


def test_no_machine_paths_and_no_index_addresses() -> None:
    words = ["/" + "work/", "/" + "root/", "pypi.org" + "/simple", "files.pythonhosted" + ".org"]
    problems = []
    for file in tracked():
        if file.name == "uv.lock" or file.suffix in (".png", ".ckpt"):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        problems += [f"{file.relative_to(ROOT)}: {word}" for word in words if word in text]
    assert not problems
