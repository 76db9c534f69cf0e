"""What can be wrong with options, data, disk and run folders ends in one line with a remedy, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from css.data.split_files import write_splits
from css.data.voc import VOC
from css.steps import load_weights
from css.task import Task
from PIL import Image
from polymodal import files
from polymodal.callbacks import load_checkpoint
from polymodal.testing import manifest

SMALL = ["--config", "smoke", "--data.images", "[16, 4, 8]", "--data.classes", "3", "--trainer.max_epochs", "1"]
SMALL += ["--loader.batch_size", "4", "--memory.budget", "4"]


@pytest.fixture
def line(css_train, complains) -> Callable[..., str]:
    """The only line of a call that must fail."""
    return lambda *arguments: complains(css_train(*arguments), "css-train: error: ")


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "2-2"], "task '2-2' does not fit 3 classes; after 2 base classes, steps of 1 fit"),
        (["--task", "4-1"], "task '4-1' does not fit 3 classes; base must be 1..3"),
        (["--task", "two-one"], "task 'two-one'; expected 'B-I' such as 15-1"),
        (["--order", "[1, 2]"], "class order has 2 entries; expected each of 1..3 once"),
        (["--order", "[1, 2, 2]"], "expected each of 1..3 once"),
        (["--setting", "overlapped"], "overlap"),
        (["--method", "eri"], "did you mean eir"),
        (["--method_options.treshold", "0.5"], "did you mean threshold"),
        (["--method_options.threshold", "high"], "option threshold='high'; expected a number"),
        (["--method_options.distillation", "old"], "distillation='old'; expected one of two_region"),
        (["--method_options.max_pastes", "0"], "max_pastes=0; expected at least 1"),
        (["--method_options.cell_share", "1.5"], "cell_share=1.5; expected 0 < cell_share <= 1"),
        (["--method_options.lam", "2"], "lam=2; expected an opacity, 0..1"),
        (["--memory.budget", "-1"], "memory.budget=-1; expected 0 or more"),
        (["--memory.buget", "8"], "buget"),
        (["--loader.batch_size", "0"], "loader.batch_size=0; expected at least 1"),
        (["--loader.num_workers", "-1"], "loader.num_workers=-1; expected 0 or more"),
        (["--loader.scale", "[2, 1]"], "loader.scale"),
        (["--optim.lr", "0"], "optim.lr=0.0; expected more than 0"),
        (["--trainer.max_epochs", "many"], "max_epochs"),
        (["--network.name", "tinny"], "did you mean tiny"),
        (["--network.name", "timm:no_such_net"], "no_such_net"),
        (["--network.weights", "/nowhere.pth"], "/nowhere.pth"),
        (["--data", "voc12"], "known: shapes, voc"),
        (["--data", "voc"], "no root folder"),
        (["--data", "voc", "--data.root", "/nowhere"], "voc root: /nowhere does not exist; give the folder VOC2012"),
        (["--data", "ade20k", "--data.root", "/nowhere"], "/nowhere does not exist"),
        (["--data", "pairs", "--data.root", "/nowhere"], "/nowhere does not exist"),
        (["--out", "/proc/nowhere"], "--out"),
        (["--resume", "auto"], "no unfinished run of this configuration and seed"),
        (["--resume", "/nowhere"], "no such run folder or checkpoint"),
        (["stray"], "stray"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(line, tmp_path: Path, options: list[str], words: str) -> None:
    base = [] if "--data" in options else SMALL
    assert words in line(*base, *options)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs" / "css").glob("*")), "nothing was begun"


def test_a_configuration_file_with_mistakes(line, tmp_path: Path) -> None:
    for text, words in (
        ("netwrk:\n  name: tiny\n", "netwrk"),
        ("task: [", "not valid YAML"),
        ("data: vco\n", "did you mean voc"),
    ):
        (tmp_path / "own.yaml").write_text(text)
        assert words in line("--config", tmp_path / "own.yaml")


def test_debug_shows_where_it_came_from(css_train) -> None:
    result = css_train(*SMALL, "--task", "2-2", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.rstrip().splitlines()[-1].startswith("css-train: error: task '2-2'")


# ------------------------------------------------------------------ data


@pytest.fixture
def voc(tmp_path: Path, layouts) -> Path:
    """Forty pictures of VOC 2012 with two classes each; every class occurs in training and test."""
    return layouts.write_voc(tmp_path / "data", 20, 20, size=(40, 40)) / "VOCdevkit" / "VOC2012"


@pytest.fixture
def on_voc(css_train, voc: Path):
    options = ["--config", "smoke", "--data", "voc", "--data.root", voc, "--task", "10-10", "--trainer.max_epochs", "1"]
    options += ["--loader.crop", "32"]
    return lambda *more: css_train(*options, *more)


def mask(voc: Path, number: int) -> Path:
    return sorted((voc / "SegmentationClassAug").glob("2007_*.png"))[number]


def unknown_id(voc: Path) -> Path:
    path = mask(voc, 3)
    values = np.array(Image.open(path))
    values[0, 0] = 77
    Image.fromarray(values).save(path)
    return path


def other_size(voc: Path) -> Path:
    path = mask(voc, 3)
    Image.open(path).crop((0, 0, 39, 40)).save(path)
    return path


def colours(voc: Path) -> Path:
    path = mask(voc, 3)
    Image.open(path).convert("RGB").save(path)
    return path


def no_mask(voc: Path) -> Path:
    path = mask(voc, 3)
    path.unlink()
    return path


def no_list(voc: Path) -> Path:
    path = voc / "ImageSets" / "Segmentation" / "val.txt"
    path.unlink()
    return path


def empty_list(voc: Path) -> Path:
    path = voc / "ImageSets" / "Segmentation" / "train_aug.txt"
    path.write_text("\n")
    return path


def half_mask(voc: Path) -> Path:
    path = mask(voc, 3)
    path.write_bytes(path.read_bytes()[:40])
    return path


SPOILT: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a mask with an unknown id": (unknown_id, "77"),
    "image and mask of different sizes": (other_size, "40"),
    "a mask in colours": (colours, "RGB"),
    "a missing mask": (no_mask, "missing"),
    "a missing list": (no_list, "is missing; "),
    "an empty list": (empty_list, "copy it again"),
    "half a mask": (half_mask, "copy"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_bad_data_is_named(on_voc, complains, voc: Path, what: str) -> None:
    spoil, word = SPOILT[what]
    path = spoil(voc)
    text = complains(on_voc(), path.stem, word)
    assert ";" in text, "there is a remedy"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_in_the_middle_of_an_epoch(
    css_train, on_voc, complains, voc: Path, only_run, workers: int
) -> None:
    """The masks have been indexed, pictures are read when they are needed; once mended, the run goes on."""
    bad = sorted((voc / "JPEGImages").glob("2007_*.jpg"))[9]
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    every = ["--trainer.checkpoint_every_steps", 1, "--loader.batch_size", 2]
    text = complains(on_voc("--loader.num_workers", workers, *every), str(bad), "copy")
    assert "Caught" not in text
    assert manifest(only_run())["status"] == "failed"
    assert (only_run() / "checkpoints" / "last.ckpt").is_file(), "what was trained before is there"
    bad.write_bytes(whole)
    result = css_train("--resume", only_run())
    assert result.code == 0, result.err


def test_a_picture_of_a_later_step_that_is_broken(css_train, on_voc, complains, voc: Path, only_run) -> None:
    """The base step does not read it, so it stays finished, and the run goes on from there."""
    later = next(
        path
        for path in sorted((voc / "SegmentationClassAug").glob("2007_*.png"))
        if all(value in (0, 255) or value > 10 for value in np.unique(np.array(Image.open(path))))
    )
    bad = voc / "JPEGImages" / f"{later.stem}.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:50])
    complains(on_voc(), str(bad))
    folder = only_run()
    assert manifest(folder)["status"] == "failed"
    assert (folder / "steps" / "00" / "done.json").is_file()
    before = (folder / "steps" / "00" / "weights.safetensors").read_bytes()
    bad.write_bytes(whole)
    result = css_train("--resume", folder)
    assert result.code == 0, result.err
    assert (folder / "steps" / "00" / "weights.safetensors").read_bytes() == before
    assert manifest(folder)["status"] == "finished"


def test_a_step_without_pictures_is_told_before_anything_is_trained(line, tmp_path: Path, layouts) -> None:
    train = {f"2007_{i:06d}": (1 + i % 2, 3) for i in range(8)}
    root = layouts.write_voc(tmp_path / "data", train, 20, size=(40, 40))
    text = line("--config", "smoke", "--data", "voc", "--data.root", root, "--task", "15-5")
    assert "task 15-5, step 1, setting overlap: no training picture for the classes 16 (pottedplant)" in text
    assert not (tmp_path / "runs").exists()


def test_a_split_file_that_was_changed(css_train, on_voc, complains, voc: Path, tmp_path: Path) -> None:
    folder = tmp_path / "splits"
    write_splits(folder, VOC(root=voc), Task("10-10", 20), "overlap")
    path = folder / "train-step1.txt"
    text = path.read_text()
    path.write_text(text.rstrip().rpartition("\n")[0] + "\n")
    complains(on_voc("--data.split_files", folder), str(path), "checksum", "copy the file again")
    path.write_text(text)
    complains(on_voc("--data.split_files", folder, "--setting", "disjoint"), "setting overlap, this run has disjoint")
    path.unlink()
    complains(on_voc("--data.split_files", folder), str(path))
    assert not (tmp_path / "runs").exists()
    path.write_text(text)
    assert on_voc("--data.split_files", folder, "--trainer.max_steps", "1").code == 0


def test_a_budget_of_nothing_is_no_memory(css_train, only_run) -> None:
    result = css_train(*SMALL, "--memory.budget", "0")
    assert result.code == 0, result.err
    assert json.loads((only_run() / "steps" / "01" / "memory" / "index.json").read_text())["entries"] == []
    assert not list((only_run() / "steps" / "01" / "memory").rglob("*.png"))


# ------------------------------------------------------------------ run folders


@pytest.fixture
def finished(css_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(css_run, tmp_path / "runs" / "css" / css_run.name))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "3-1"], "a run with task 2-1, not 3-1; leave --task out"),
        (["--setting", "disjoint"], "a run with setting overlap, not disjoint"),
        (["--order", "[4, 3, 2, 1]"], "a run with order [1, 2, 3, 4], not [4, 3, 2, 1]"),
        (["--method", "ft"], "a run with method eir, not ft"),
        (["--seed", "4"], "a run with seed 3, not 4"),
        (["--data.world_seed", "9"], "the data changed since that run started"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_runs_folder_is_not_resumed(line, finished: Path, options: list[str], words: str) -> None:
    before = (finished / "manifest.json").read_bytes()
    assert words in line("--resume", finished, *options)
    assert (finished / "manifest.json").read_bytes() == before, "a refused run is left as it was"


def test_a_run_of_another_command_is_not_resumed(line, finished: Path) -> None:
    facts = json.loads((finished / "manifest.json").read_text())
    (finished / "manifest.json").write_text(json.dumps(facts | {"task": "slt"}))
    assert "a run of task 'slt', not 'css'; use its own command" in line("--resume", finished)


def test_damaged_weights_of_the_step_before(line, css_train, css_run: Path, finished: Path) -> None:
    weights = finished / "steps" / "01" / "weights.safetensors"
    (finished / "steps" / "02" / "done.json").unlink()
    for content in (weights.read_bytes()[:-50], b"", b"no weights at all, but longer than a header"):
        weights.write_bytes(content)
        text = line("--resume", finished)
        assert str(weights) in text
        assert "delete the done.json beside it, css-train --resume then trains the step again" in text
    (weights.parent / "done.json").unlink()
    assert css_train("--resume", finished).code == 0
    assert weights.read_bytes() == (css_run / "steps" / "01" / "weights.safetensors").read_bytes()
    last = "steps/02/weights.safetensors"
    assert (finished / last).read_bytes() == (css_run / last).read_bytes()


def test_weights_of_another_network(line, finished: Path) -> None:
    (finished / "steps" / "02" / "done.json").unlink()
    assert "keep network, order and task of the run" in line("--resume", finished, "--network.width", "4")


def test_a_damaged_mark(line, finished: Path) -> None:
    (finished / "steps" / "01" / "done.json").write_text("{")
    assert "steps/01/done.json is damaged" in line("--resume", finished)


def test_a_newer_file(line, finished: Path) -> None:
    from css.steps import save_weights

    (finished / "steps" / "02" / "done.json").unlink()
    weights = finished / "steps" / "01" / "weights.safetensors"
    state, meta = load_weights(weights)
    save_weights(weights, state, meta | {"schema_version": 99})
    assert "schema version 99 is newer than this css reads; update it" in line("--resume", finished)


# ------------------------------------------------------------------ disk


def test_a_disk_that_fills_up_in_a_later_step(css_train, complains, only_run, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = files.atomic_write, [0]

    def full(path: Path, writer) -> None:
        if path.name == "weights.safetensors":
            count[0] += 1
            if count[0] == 2:
                raise files._explain(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        original(path, writer)

    monkeypatch.setattr(files, "atomic_write", full)
    complains(css_train(*SMALL), "disk full while writing", "continue with --resume")
    folder = only_run()
    assert manifest(folder)["status"] == "failed"
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["polymodal"]["stage"] == 1
    assert css_train("--resume", folder).code == 0
    assert manifest(folder)["status"] == "finished"


# ------------------------------------------------------------------ the console script


def test_the_console_script_says_one_line_on_stderr(cache_folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "css-train", *SMALL, "--task", "2-2"], cwd=tmp_path, capture_output=True,
        text=True, timeout=120, env=os.environ | {"POLYMODAL_CACHE": str(cache_folder)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    (text,) = done.stderr.splitlines()
    assert text.startswith("css-train: error: task '2-2' does not fit 3 classes")
