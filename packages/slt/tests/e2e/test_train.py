"""slt-train as its users call it: a small run from end to end, and the published settings at full size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from polymodal.testing import rows

PROGRAM = Path(sys.executable).parent / "slt-train"


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"HOME": str(folder), "POLYMODAL_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(PROGRAM), *arguments], cwd=folder, env=environment(folder), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(folder, *arguments)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def newest(folder: Path) -> Path:
    return sorted((folder / "runs" / "slt").glob("*/"))[-1]


def test_smoke_run_leaves_what_is_promised(tmp_path: Path) -> None:
    code, out, error = run(tmp_path, "--config", "smoke")
    assert code == 0, error
    folder = newest(tmp_path)
    assert f"run folder  runs/slt/{folder.name}" in out
    assert "wandb sync" in out
    assert "copy_question" in out
    for name in ("config.yaml", "audit.md", "audit.json", "tokenizer", "samples/test-translations.jsonl"):
        assert (folder / name).exists(), name
    assert {p.name for p in (folder / "checkpoints").glob("*.ckpt")} >= {"last.ckpt", "best.ckpt", "previous.ckpt"}
    assert {p.stem for p in (folder / "predictions").iterdir()} >= {"ssaw", "question_only", "shuffled_question"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["method"], manifest["fidelity"]) == ("finished", "ssaw", "reconstruction")
    assert {"test/bleu4", "test/rouge_l", "test/copy_question/bleu4", "test/overlap"} <= set(manifest["metrics"])
    assert manifest["metric_signatures"]["test/bleu4"].startswith("BLEU|")
    names = {row[2] for row in rows(folder)}
    assert {"train/loss", "train/lr", "val/loss", "val/bleu4", "test/bleu4"} <= names
    code, out, error = run(tmp_path, "--config", str(folder), "--dry_run", "true")
    assert code == 0, error
    assert "nothing was trained" in out


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "data"), [("phoenix2014t_qa", "phoenix2014t"), ("csl_daily_qa", "csl_daily")])
def test_paper_shape(preset: str, data: str, tmp_path: Path, layouts: ModuleType) -> None:
    """The published setting at full size from random weights on files in the official layout: two steps a stage."""
    if data == "phoenix2014t":
        root = layouts.phoenix(tmp_path / "data" / "PHOENIX-2014-T")
        questions = root.parent / "questions"
    else:
        root = layouts.csl_daily(tmp_path / "CSL-Daily")
        questions = root / "questions"
    code, _, error = run(
        tmp_path, "--config", preset, "--data.root", str(root), "--data.questions", str(questions),
        "--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_steps", "2",
        "--stage1_epochs", "1", "--epochs", "1", "--loader.batch_size", "2", "--stage1_batch_size", "2",
        "--loader.num_workers", "0", "--audit.question_only", "false", "--log.wandb", "off", "--threads", "2",
        "--decode.max_new_tokens", "12", "--trainer.log_every_steps", "1",
    )  # fmt: skip
    assert code == 0, error
    manifest = json.loads((newest(tmp_path) / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["peak_mib"] < 20 * 1024
    sys.stdout.write(f"{preset}: peak {manifest['peak_mib']} MiB, {manifest['wall_s']} s\n")
