"""What can be wrong with options, data, disk and machine ends in one line with a remedy, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from polymodal.callbacks import load_checkpoint
from polymodal.testing import Result, folder_of, manifest, one_error

SMALL = ["--config", "smoke", "--stage", "2", "--data.sizes", "[6, 3, 3]", "--audit.question_only", "false"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer.devices", "0"], "trainer.devices=0; expected at least 1"),
        (["--trainer.accumulate", "0"], "trainer.accumulate=0; expected at least 1"),
        (["--trainer.val_every_epochs", "0"], "trainer.val_every_epochs=0; expected at least 1"),
        (["--trainer.clip_grad", "-1"], "trainer.clip_grad=-1.0; expected 0 (off) or more"),
        (["--trainer.accelerator", "abacus"], "abacus"),
        (["--trainer.extra.no_such_option", "1"], "no_such_option"),
        (["--threads", "0"], "threads=0; expected at least 1"),
        (["--optim.lr", "-1"], "lr=-1.0; expected more than 0"),
        (["--optim.warmup", "2"], "warmup=2.0; expected 0..1"),
        (["--decode.beams", "0"], "beams=0; expected at least 1"),
        (["--decode.max_new_tokens", "500"], "500 tokens, but the model has 64 positions"),
        (["--model.max_positions", "4"], "5 tokens, the model has 4 positions; shorten the sentence or raise"),
        (["--model.max_positions", "8"], "question and signs of one sample: 17 tokens, but the model has 8 positions"),
        (["--stage", "3"], "stage"),
        (["--fusion", "ssav"], "did you mean ssaw"),
        (["--data", "phenix"], "phoenix2014t"),
        (["--loader.batch_size", "zero"], "batch_size"),
        (["--out", "/proc/nowhere"], "--out"),
        (["--model.fusion_options.mood", "gate"], "mood"),
        (["--model.heads", "5"], "heads"),
        (["--tokenizer.kind", "pretrained"], "needs --tokenizer.path DIR"),
        (["--tokenizer.path", "/nowhere"], "/nowhere; give the folder of an mBART"),
        (["--model.pretrained_text", "/nowhere"], "/nowhere/config.json does not exist"),
        (["--model.backbone", "resnet18", "--model.backbone_weights", "/nowhere.pth"], "/nowhere.pth does not exist"),
        (["--loader.frame_cache", "/nowhere"], "/nowhere/index.json is missing"),
        (["--loader.feature_cache", "/nowhere"], "model.backbone=features and loader.feature_cache go together"),
        (["--model.backbone", "pose"], "pose_landmarks"),
        (["--data.questions", "/nowhere"], "question folder: /nowhere does not exist"),
        (["--data.noise", "2"], "noise=2.0; expected 0..1"),
        (["--data.colour", "red"], "colour"),
        (["--resume", "auto"], "no unfinished run of this configuration and seed"),
        (["--resume", "/nowhere"], "no such run folder or checkpoint"),
        (["--stage1_checkpoint", "/nowhere.ckpt"], "no checkpoint at /nowhere.ckpt"),
        (["stray"], "stray"),
    ],
)
def test_options(slt_train, options: list[str], words: str) -> None:
    one_error(slt_train(*SMALL, *options), "slt-train: error: ", words)


def test_a_preset_that_does_not_exist(slt_train) -> None:
    line = one_error(slt_train(*SMALL, "--config", "nothing"))
    assert "presets:" in line
    assert "synthetic" in line


def test_a_checkpoint_of_another_vocabulary(slt_train, tmp_path: Path) -> None:
    options = ["--config", "smoke", "--data.sizes", "[8, 3, 3]"]
    assert slt_train(*options, "--stage", "1").code == 0
    stage1 = folder_of(tmp_path)
    options += ["--stage", "2", "--stage1_checkpoint", stage1, "--audit.enabled", "false"]
    assert slt_train(*options).code == 0
    assert "vocabulary" in one_error(slt_train(*options, "--tokenizer.kind", "char"))


def test_a_configuration_file_with_mistakes(slt_train, tmp_path: Path) -> None:
    for text, words in (
        ("model:\n  widht: 3\n", "widht"),
        ("model: [", "not valid YAML"),
        ("data: phoenx2014t\n", "did you mean phoenix2014t"),
    ):
        (tmp_path / "own.yaml").write_text(text)
        assert words in one_error(slt_train("--config", tmp_path / "own.yaml"))


# ------------------------------------------------------------------ data


@pytest.fixture
def phoenix(tmp_path: Path, layouts: ModuleType) -> Path:
    return layouts.phoenix(tmp_path / "data" / "PHOENIX-2014-T", size=(32, 40))


@pytest.fixture
def on_phoenix(slt_train, phoenix: Path) -> Callable[..., Result]:
    options = ["--config", "smoke", "--stage", "2", "--data", "phoenix2014t", "--data.root", phoenix]
    return lambda *more: slt_train(*options, "--data.questions", phoenix.parent / "questions", *more)


def clip(phoenix: Path) -> Path:
    return phoenix / "features" / "fullFrame-210x260px" / "train" / "11August_2010_Wednesday_tagesschau-2"


def test_a_broken_frame_is_named_by_a_worker_too(on_phoenix, phoenix: Path) -> None:
    bad = clip(phoenix) / "images0003.png"
    bad.write_bytes(bad.read_bytes()[:60])
    for workers in (0, 1):
        line = one_error(on_phoenix("--loader.num_workers", workers))
        assert str(bad) in line
        assert "copy or extract it again" in line


def test_a_frame_of_another_size(on_phoenix, phoenix: Path, layouts: ModuleType) -> None:
    layouts.picture(1, (20, 20)).save(clip(phoenix) / "images0004.png")
    assert "images0004.png is 20x20, the clip's first frame is 32x40" in one_error(on_phoenix())


def empty_clip(phoenix: Path) -> None:
    for file in clip(phoenix).iterdir():
        file.unlink()


def train_annotation(phoenix: Path) -> Path:
    return phoenix / "annotations" / "manual" / "PHOENIX-2014-T.train.corpus.csv"


def drop_sentence(phoenix: Path) -> None:
    path = train_annotation(phoenix)
    path.write_text(path.read_text().replace("|Am Montag scheint die Sonne", "| "))


def write_in_latin_1(phoenix: Path) -> None:
    path = train_annotation(phoenix)
    path.write_bytes(path.read_bytes().replace("Süden".encode(), "Süden".encode("latin-1")))


def ask_about_nobody(phoenix: Path) -> None:
    with (phoenix.parent / "questions" / "train.jsonl").open("a") as handle:
        handle.write(json.dumps({"video_id": "nobody", "question": "was ?", "sentence": "nichts"}) + "\n")


def change_the_answer(phoenix: Path) -> None:
    path = phoenix.parent / "questions" / "train.jsonl"
    path.write_text(path.read_text().replace("Heute Nacht regnet es im Norden", "Etwas anderes"))


def break_questions(phoenix: Path) -> None:
    (phoenix.parent / "questions" / "dev.jsonl").write_text("{not json\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda phoenix: phoenix.rename(phoenix.with_name("moved")), ["data/PHOENIX-2014-T does not exist"]),
        (empty_clip, ["tagesschau-2"]),
        (drop_sentence, ["train.corpus.csv", "line 3"]),
        (write_in_latin_1, ["corpus.csv"]),
        (ask_about_nobody, ["train.jsonl", "nobody"]),
        (change_the_answer, ["train.jsonl:1"]),
        (break_questions, ["dev.jsonl:1"]),
    ],
    ids=["no folder", "no frames", "no sentence", "encoding", "unknown id", "other sentence", "no JSON"],
)
def test_bad_data_is_named(on_phoenix, phoenix: Path, spoil: Callable[[Path], None], words: list[str]) -> None:
    spoil(phoenix)
    line = one_error(on_phoenix())
    for word in words:
        assert word in line


def test_a_frame_lost_after_indexing(on_phoenix, phoenix: Path) -> None:
    assert on_phoenix("--dry_run", "true").code == 0
    (clip(phoenix) / "images0016.png").unlink()
    assert "has 15 frames, 16 when it was indexed; the index was dropped" in one_error(on_phoenix())
    assert on_phoenix("--dry_run", "true").code == 0, "indexed again"


def test_a_split_without_rows_or_file(on_phoenix, phoenix: Path) -> None:
    path = phoenix / "annotations" / "manual" / "PHOENIX-2014-T.dev.corpus.csv"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert "has no rows" in one_error(on_phoenix())
    path.unlink()
    assert str(path) in one_error(on_phoenix())


def test_one_clip_in_two_splits(on_phoenix, phoenix: Path) -> None:
    folder = phoenix / "annotations" / "manual"
    row = (folder / "PHOENIX-2014-T.dev.corpus.csv").read_text().splitlines()[1]
    with (folder / "PHOENIX-2014-T.train.corpus.csv").open("a") as handle:
        handle.write(row + "\n")
    frames = phoenix / "features" / "fullFrame-210x260px"
    (frames / "train" / "05May_2011_Thursday_tagesschau-3").symlink_to(
        frames / "dev" / "05May_2011_Thursday_tagesschau-3"
    )
    questions = phoenix.parent / "questions"
    with (questions / "train.jsonl").open("a") as handle:
        handle.write((questions / "dev.jsonl").read_text())
    line = one_error(on_phoenix())
    assert "05May_2011_Thursday_tagesschau-3 is in train and dev; a video belongs to one split" in line


def test_data_that_changed_since_the_run_started(slt_train, on_phoenix, phoenix: Path, tmp_path: Path) -> None:
    assert on_phoenix("--trainer.max_steps", "1", "--audit.enabled", "false").code == 0
    folder = folder_of(tmp_path)
    questions = phoenix.parent / "questions" / "train.jsonl"
    questions.write_text(questions.read_text().replace("Wie wird der Montag ?", "Und der Montag ?"))
    assert "the data changed since that run started" in one_error(slt_train("--resume", folder))


# ------------------------------------------------------------------ disk


def test_a_disk_that_fills_up(slt_train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = torch.save, [0]

    def full(value, handle, *rest, **options):
        count[0] += 1
        if count[0] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(value, handle, *rest, **options)

    monkeypatch.setattr(torch, "save", full)
    options = [*SMALL, "--epochs", "3", "--trainer.checkpoint_every_steps", "1", "--loader.batch_size", "2"]
    line = one_error(slt_train(*options))
    assert "disk full while writing" in line
    assert "continue with --resume" in line
    folder = folder_of(tmp_path)
    assert manifest(folder)["status"] == "failed"
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["polymodal"]["step"] == 2
    assert slt_train("--resume", folder).code == 0


def test_a_cache_folder_that_cannot_be_written(slt_train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "file"))
    assert "POLYMODAL_CACHE" in one_error(slt_train(*SMALL, "--data.world_seed", "77"))


# ------------------------------------------------------------------ machine


def test_no_terminal_no_home_no_account(tmp_path: Path) -> None:
    """As a job without a home folder: W&B is offline, nothing is asked, nothing is written beside the run folder."""
    program = Path(sys.executable).parent / "slt-train"
    keep = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HOME": str(tmp_path / "absent")}
    done = subprocess.run(
        [program, *SMALL, "--data.root", tmp_path / "worlds", "--audit.enabled", "false"],
        cwd=tmp_path,
        env=keep | {"POLYMODAL_CACHE": str(tmp_path / "cache")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (command,) = [line.split("upload")[1].strip() for line in done.stdout.splitlines() if line.startswith("upload")]
    assert command.startswith("wandb sync ")
    assert (tmp_path / command.removeprefix("wandb sync ")).is_dir()
    assert "\x1b[" not in done.stdout + done.stderr, "no colours and bars where there is no terminal"
    assert {p.name for p in tmp_path.iterdir()} - {"absent"} == {"cache", "runs", "worlds"}
