"""slt-train as its users call it: a small run from end to end, killed and resumed, and bad input in one line."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).parent / "slt-train"


def layouts():
    spec = importlib.util.spec_from_file_location("slt_e2e_layouts", Path(__file__).parent / "_layouts.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["slt_e2e_layouts"] = module
    spec.loader.exec_module(module)
    return module


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


def rows(folder: Path) -> list[list[str]]:
    with (folder / "metrics.csv").open() as handle:
        return [r for r in csv.reader(handle) if not r[2].startswith("perf/")]


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


@pytest.fixture
def phoenix(tmp_path: Path) -> Path:
    return layouts().phoenix(tmp_path / "data" / "PHOENIX-2014-T", size=(32, 40))


def attempt(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The command in this process; exit code and stderr without notes."""
    from polymodal.cli import command
    from slt.data import READERS
    from slt.settings import SLTConfig
    from slt.train import DEFAULT_PRESETS, train

    capsys.readouterr()
    code = command(
        train, SLTConfig, prog="slt-train", presets="slt", choices={"data": READERS}, default_presets=DEFAULT_PRESETS,
        aliases={"fusion": "model.fusion"}, argv=[*arguments, "--log.wandb", "off"],
    )  # fmt: skip
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("root", ["no such", "PHOENIX"]),
        ("frames", ["tagesschau-2"]),
        ("truncated", ["images0003.png"]),
        ("sentence", ["train.corpus.csv", "line 3"]),
        ("unknown id", ["train.jsonl", "nobody"]),
        ("other sentence", ["train.jsonl:1"]),
        ("encoding", ["corpus.csv"]),
        ("json", ["dev.jsonl:1"]),
    ],
)
def test_bad_data_ends_in_one_line(
    spoil: str, words: list[str], phoenix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = phoenix.parent / "questions"
    csv_file = phoenix / "annotations" / "manual" / "PHOENIX-2014-T.train.corpus.csv"
    clip = phoenix / "features" / "fullFrame-210x260px" / "train" / "11August_2010_Wednesday_tagesschau-2"
    root = phoenix
    if spoil == "root":
        root = tmp_path / "no such PHOENIX"
    elif spoil == "frames":
        for file in clip.iterdir():
            file.unlink()
    elif spoil == "truncated":
        (clip / "images0003.png").write_bytes((clip / "images0003.png").read_bytes()[:60])
    elif spoil == "sentence":
        csv_file.write_text(csv_file.read_text().replace("|Am Montag scheint die Sonne", "| "))
    elif spoil == "unknown id":
        line = json.dumps({"video_id": "nobody", "question": "was ?", "sentence": "nichts"})
        (questions / "train.jsonl").write_text((questions / "train.jsonl").read_text() + line + "\n")
    elif spoil == "other sentence":
        text = (questions / "train.jsonl").read_text()
        (questions / "train.jsonl").write_text(text.replace("Heute Nacht regnet es im Norden", "Etwas anderes"))
    elif spoil == "encoding":
        csv_file.write_bytes(csv_file.read_bytes().replace("Süden".encode(), "Süden".encode("latin-1")))
    elif spoil == "json":
        (questions / "dev.jsonl").write_text("{not json\n")
    arguments = ["--config", "smoke", "--data", "phoenix2014t", "--data.root", str(root)]
    arguments += ["--data.questions", str(questions), "--out", str(tmp_path / "runs"), "--stage", "2"]
    code, error = attempt(capsys, *arguments)
    final = error.strip().splitlines()[-1]
    assert code == 2, error
    assert final.startswith("slt-train: error: ")
    assert "Traceback" not in error
    for word in words:
        assert word in final, final


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fusion", "ssav"], ["did you mean ssaw"]),
        (["--config", "nothing"], ["presets:", "synthetic"]),
        (["--data", "phenix"], ["phoenix2014t"]),
        (["--loader.batch_size", "zero"], ["batch_size"]),
        (["--out", "/proc/nowhere"], ["--out"]),
        (["--stage1_checkpoint", "/nowhere.ckpt"], ["/nowhere.ckpt"]),
        (["--model.fusion_options.mood", "gate"], ["mood"]),
        (["--model.heads", "5"], ["heads"]),
    ],
)
def test_bad_options_end_in_one_line(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--config", "smoke", "--data.root", str(tmp_path), "--data.sizes", "[6, 3, 3]", "--stage", "2"]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "runs")]
    code, error = attempt(capsys, *small, *out, *arguments)
    assert code == 2, error
    for word in words:
        assert word in error.strip().splitlines()[-1], error


def test_checkpoint_of_another_vocabulary_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--config", "smoke", "--data.root", str(tmp_path), "--out", str(tmp_path / "runs")]
    assert attempt(capsys, *small, "--data.sizes", "[8, 3, 3]", "--stage", "1")[0] == 0
    stage1 = newest(tmp_path)
    small += ["--stage", "2", "--stage1_checkpoint", str(stage1), "--audit.enabled", "false"]
    assert attempt(capsys, *small, "--data.sizes", "[8, 3, 3]")[0] == 0
    code, error = attempt(capsys, *small, "--data.sizes", "[8, 3, 3]", "--tokenizer.kind", "char")
    assert code == 2
    assert "vocabulary" in error.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "data"), [("phoenix2014t_qa", "phoenix2014t"), ("csl_daily_qa", "csl_daily")])
def test_paper_shape(preset: str, data: str, tmp_path: Path) -> None:
    """The published setting at full size from random weights on files in the official layout: two steps a stage."""
    if data == "phoenix2014t":
        root = layouts().phoenix(tmp_path / "data" / "PHOENIX-2014-T")
        questions = root.parent / "questions"
    else:
        root = layouts().csl_daily(tmp_path / "CSL-Daily")
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
