"""Every snippet of the READMEs runs: Python blocks as they are, commands through this environment's console scripts.

Blocks marked ``no-run`` need data or hours; their options are checked by the commands' own parsers where possible.
A training command without argument is its default run (slow); ``uv run pytest`` is this.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ["README.md", "CONTRIBUTING.md", "shared/README.md", "docs/questions.md", "docs/reproducing.md"]
FILES += [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("packages/*/README.md"))]
BLOCK = re.compile(r"^```(\w+)( no-run)?\n(.*?)^```", re.M | re.S)
SLT = ("slt-train", "slt-eval", "slt-translate", "slt-data")
CSS = ("css-train", "css-eval", "css-predict", "css-data")
FED = ("fed-train", "fed-compare", "fed-data", "fed-landscape", "fed-privacy")
VLM = ("vlm-bench", "vlm-generate", "vlm-show")
MM = ("mm-train", "mm-eval", "mm-predict", "mm-matrix", "mm-data")
PROGRAMS = (*SLT, *CSS, *FED, *VLM, *MM, "polymodal")
SHORT = ("--fusion", "--epochs", "--model", "--rounds", "--lr", "--clients", "--alpha", "--backbone", "--help")


def blocks() -> list[tuple[str, str, bool, str]]:
    found = []
    for name in FILES:
        for language, skip, text in BLOCK.findall((ROOT / name).read_text(encoding="utf-8")):
            found.append((name, language, bool(skip), text))
    return found


def commands(text: str) -> list[list[str]]:
    """Lines of a shell block that call our programs, without comments, line ends joined, ``uv run`` dropped."""
    lines = text.replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    split = [words[2:] if words[:2] == ["uv", "run"] else words for words in split]
    return [words for words in split if words and words[0] in PROGRAMS]


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"HOME": str(folder), "POLYMODAL_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


def call(words: list[str], folder: Path, timeout: float = 300) -> None:
    program = Path(sys.executable).parent / words[0]
    done = subprocess.run(
        [str(program), *words[1:]], cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"


def test_links_lead_somewhere() -> None:
    for name in FILES:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (ROOT / name).parent.joinpath(target).exists(), f"{name}: {target}"


@pytest.mark.parametrize("name", [n for n, language, skip, _ in blocks() if language == "python" and not skip])
def test_python_snippets_run(name: str, tmp_path: Path) -> None:
    for file, language, skip, text in blocks():
        if (file, language, skip) == (name, "python", False):
            script = tmp_path / "snippet.py"
            script.write_text(text, encoding="utf-8")
            done = subprocess.run(
                [sys.executable, script.name], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr


def test_command_snippets_run(tmp_path: Path) -> None:
    wanted = [
        words for _, language, skip, text in blocks() if language == "bash" and not skip for words in commands(text)
    ]
    # A training command without argument is test_default_run.
    wanted = [words for words in wanted if words[1:] or not words[0].endswith("-train")]
    # Training first, so that the reports find runs; each different command once.
    unique = sorted({tuple(words) for words in wanted}, key=lambda words: not words[0].endswith("-train"))
    assert {
        ("slt-train", "--config", "smoke"),
        ("css-train", "--config", "smoke"),
        ("fed-train", "--config", "smoke"),
        ("mm-train", "--config", "smoke"),
    } <= set(unique)
    for words in unique:
        call(list(words), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["slt-train", "css-train", "fed-train", "mm-train"])
def test_default_run(program: str, tmp_path: Path) -> None:
    call([program], tmp_path, timeout=900)


def test_options_of_other_commands_exist() -> None:
    """Every option that a README names is in the help of its command."""
    helps: dict[str, str] = {}
    for name, language, _, text in blocks():
        for words in commands(text) if language == "bash" else []:
            program = words[0]
            # Commands of commands: their names come before the first option.
            deep = 2 if words[1:2] in (["memory"], ["partition"]) else 1
            group = words[1 : 1 + deep] if program.endswith("-data") or program == "polymodal" else []
            tail = ["--help"] if program == "polymodal" else ["--help", "all"]
            key = " ".join([program, *group])
            if key not in helps:
                path = Path(sys.executable).parent / program
                helps[key] = subprocess.run([str(path), *group, *tail], capture_output=True, text=True).stdout
            for word in words[1:]:
                option = word.partition("=")[0]
                if option.startswith("--") and option not in SHORT:
                    assert option in helps[key] or option.startswith("--data."), f"{name}: {key} has no {option}"
