"""``css-eval``: the very scores of training, any checkpoint and split, scores against a loop, mistakes."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from css.checkpoint import load_network
from css.data.pairs import Pairs
from css.eval_settings import gather
from css.report import read_confusion, read_report
from css.task import Task
from PIL import Image

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def folder_of(result):
    assert result.code == 0, result.err
    return Path(re.search(r"^run folder  (.*)$", result.out, re.MULTILINE)[1])


def rows(path):
    with path.open() as handle:
        return list(csv.DictReader(handle))


@pytest.fixture
def pairs(tmp_path, layouts):
    """Eight and four pictures of 48 x 64, two classes each."""
    return Pairs(root=layouts.write_pairs(tmp_path / "pairs"))


def by_loop(folder, data, task, step, unseen=0):
    """Confusion of the test pictures at their own size: one picture, one pixel, one count at a time."""
    loaded = load_network(folder)
    seen = {0: 0, 255: 255} | {
        raw: place for place, raw in enumerate(task.order[: task.num_channels(step) - 1], start=1)
    }
    matrix = np.zeros((task.num_channels(step),) * 2, int)
    for item in data.items("test"):
        image = np.asarray(Image.open(item.image).convert("RGB")) / 255
        values = torch.tensor((image - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)[None]
        mask = np.asarray(Image.open(item.mask))
        if not any(0 < seen.get(int(raw), 0) < 255 for raw in np.unique(mask)):
            continue
        with torch.no_grad():
            logits = loaded.net.full_logits(values)[0].double().numpy()
        scores = 1 / (1 + np.exp(-logits[1:]))
        guess = np.where(scores.max(0) > 0.5, scores.argmax(0) + 1, 0)
        for raw, found in zip(mask.ravel().tolist(), guess.ravel().tolist(), strict=True):
            label = seen.get(raw, unseen)
            if label != 255:
                matrix[label, found] += 1
    return matrix


# ------------------------------------------------------------------ a trained run


def test_every_form_of_a_checkpoint_gives_the_scores_of_its_training(css_run, css_eval):
    last = read_report(css_run / "steps" / "02")
    for place in ("", "steps/02", "steps/02/weights.safetensors", "checkpoints/last.ckpt"):
        folder = folder_of(css_eval(css_run / place, "--pictures", 0))
        found = read_report(folder)
        assert np.array_equal(found.confusion, last.confusion), place
        assert found == last
    first = read_report(folder_of(css_eval(css_run / "steps" / "00", "--pictures", "0")))
    assert np.array_equal(first.confusion, read_confusion(css_run / "steps" / "00" / "confusion.json"))


def test_the_run_folder_has_tables_matrix_and_pictures(css_run, css_eval):
    result = css_eval(css_run)
    folder = folder_of(result)
    report = read_report(folder)
    table = rows(folder / "classes.csv")
    assert [row["name"] for row in table] == ["background", "disc", "square", "triangle", "cross"]
    for row, score in zip(table[1:], report.classes, strict=True):
        assert (int(row["channel"]), int(row["id"]), int(row["learnt_in"])) == (score.channel, score.raw, score.step)
        union = int(row["truth"]) + int(row["predicted"]) - int(row["correct"])
        assert float(row["iou"]) == pytest.approx(100 * int(row["correct"]) / union if union else 0)
        assert f"{score.name}" in result.out
    matrix = rows(folder / "confusion.csv")
    assert [[int(row[name]) for name in list(row)[1:]] for row in matrix] == report.confusion.tolist()
    assert {path.name for path in (folder / "figures").iterdir()} == {"confusion.png", "predictions.png"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["task"], manifest["job_type"], manifest["method"]) == ("css", "eval", "eir")
    assert (manifest["status"], manifest["split"], manifest["step"], manifest["seed"]) == ("finished", "test", 2, 3)
    assert manifest["metrics"] == {f"test/{name}": value for name, value in report.metrics().items()}
    assert set(manifest["metric_signatures"]) == set(manifest["metrics"])
    assert manifest["data"]["fingerprint"] == json.loads((css_run / "manifest.json").read_text())["data"]["fingerprint"]
    assert "test/miou_all" in (folder / "metrics.csv").read_text()
    assert "other pictures" not in result.err


def test_other_splits_have_their_own_names(css_run, css_eval):
    for split in ("val", "train"):
        folder = folder_of(css_eval(css_run, "--split", split, "--pictures", 0))
        metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
        assert set(metrics) == {f"{split}/miou_{name}" for name in ("old", "new", "all", "harmonic")}
        assert read_report(folder).images > 0


def test_the_console_script_evaluates(css_run, tmp_path, cache_folder):
    done = subprocess.run(
        [
            Path(sys.executable).with_name("css-eval"),
            css_run,
            "--out",
            tmp_path,
            "--log.wandb",
            "off",
            "--pictures",
            "2",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "POLYMODAL_CACHE": str(cache_folder), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "| harmonic " in done.stdout
    (folder,) = (tmp_path / "css").iterdir()
    assert read_report(folder) == read_report(css_run / "steps" / "02")


# ------------------------------------------------------------------ networks that nobody trained


@pytest.mark.parametrize("unseen", ["background", "ignore"])
def test_native_scores_are_those_of_a_loop_over_pixels(pairs, untrained, css_eval, unseen):
    task = Task("1-1", 4, (3, 1, 4, 2))
    folder = untrained(pairs, task, 1)
    found = folder_of(
        css_eval(folder, "--eval_size", "native", "--unseen_as", unseen, "--data", "pairs", "--data.root", pairs.root)
    )
    report = read_report(found)
    assert np.array_equal(report.confusion, by_loop(folder, pairs, task, 1, 255 if unseen == "ignore" else 0))
    assert [score.name for score in report.classes] == ["bar", "disc"]
    assert (report.confusion.sum(0) > 0).sum() > 1  # the random network says more than background
    how = json.loads((found / "manifest.json").read_text())["metric_signatures"]["test/miou_all"]
    assert "whole pictures" in how
    assert f"unseen classes: {unseen}" in how


def test_methods_with_competing_logits_are_tested_by_their_own_rule(pairs, untrained, css_eval):
    folder = untrained(pairs, Task("2-2", 4), 1, method="mib")
    confusion = read_report(
        folder_of(css_eval(folder, "--data", "pairs", "--data.root", pairs.root, "--eval_size", "native"))
    ).confusion
    loaded, guesses = load_network(folder), np.zeros(5, int)
    for item in pairs.items("test"):
        values = (pairs.load_image(item) / 255 - MEAN) / STD
        with torch.no_grad():
            guess = loaded.net.full_logits(torch.tensor(values).float().permute(2, 0, 1)[None]).argmax(1)[0].numpy()
        guesses += np.bincount(guess[pairs.load_mask(item) != 255], minlength=5)
    assert np.array_equal(confusion.sum(0), guesses)


def test_joint_training_is_reported_by_the_steps_of_its_task(pairs, untrained, css_eval):
    folder = untrained(pairs, Task("offline", 4), 0, method="joint", report_task="2-1")
    report = read_report(folder_of(css_eval(folder, "--data", "pairs", "--data.root", pairs.root, "--pictures", 0)))
    assert [score.step for score in report.classes] == [0, 0, 1, 2]
    assert set(report.metrics()) == {"miou_old", "miou_new", "miou_all", "miou_harmonic"}


def test_batches_do_not_matter(pairs, untrained, css_eval):
    options = ["--data", "pairs", "--data.root", pairs.root, "--pictures", 0]
    folder = untrained(pairs, Task("2-1", 4), 2)
    one, many = (read_report(folder_of(css_eval(folder, *options, "--batch_size", size))) for size in (1, 3))
    assert np.array_equal(one.confusion, many.confusion)
    assert one.images == many.images == 4


# ------------------------------------------------------------------ mistakes


def test_data_of_other_classes_are_refused(pairs, untrained, css_eval, complains, layouts, tmp_path):
    folder = untrained(pairs, Task("2-1", 4), 2)
    other = layouts.write_pairs(tmp_path / "other", names=("disc", "ring", "bar", "moon"))
    complains(css_eval(folder, "--data", "pairs", "--data.root", other), "class 4 is 'moon' and 'star'", "pairs")
    fewer = layouts.write_pairs(tmp_path / "fewer", names=("disc", "ring", "bar"))
    complains(css_eval(folder, "--data", "pairs", "--data.root", fewer), "3 and 4 of them")
    complains(css_eval(folder, "--data", "shapes"), "other classes")
    assert not (tmp_path / "out").exists()


def test_other_pictures_of_the_same_classes_are_noted(pairs, untrained, css_eval, layouts, tmp_path):
    folder = untrained(pairs, Task("2-1", 4), 2)
    other = layouts.write_pairs(tmp_path / "other", train=10)
    result = css_eval(folder, "--data", "pairs", "--data.root", other, "--pictures", 0)
    assert result.code == 0
    assert "trained on other pictures or labels" in result.err


def test_a_lone_weight_file_needs_its_data_named(css_run, css_eval, complains, tmp_path):
    lone = tmp_path / "lone" / "weights.safetensors"
    lone.parent.mkdir()
    shutil.copy(css_run / "steps" / "02" / "weights.safetensors", lone)
    complains(css_eval(lone), "weights.safetensors", "--data")


def test_mistakes_are_one_line(css_run, css_eval, complains, pairs, untrained, tmp_path):
    complains(css_eval(), "no checkpoint given", "css-eval CHECKPOINT")
    complains(css_eval(tmp_path / "nowhere"), "nowhere", "no such file or folder")
    complains(css_eval(tmp_path), "no finished step")
    broken = tmp_path / "weights.safetensors"
    broken.write_bytes(b"nothing")
    complains(css_eval(broken), "weights.safetensors", "damaged")
    complains(css_eval(css_run, "--split", "dev"), "split")
    complains(css_eval(css_run, "--device", "cuda" if not torch.cuda.is_available() else "mps"), "--device")
    complains(css_eval(css_run, "--batch_size", 0), "eval_batch_size=0")
    complains(css_eval(css_run, "--data.root", tmp_path / "gone", "--data.nonsense", 1), "nonsense")
    folder = untrained(pairs, Task("2-1", 4), 2)
    complains(css_eval(folder, "--split", "val", "--data", "pairs", "--data.root", pairs.root), "--split val", "pairs")


def test_a_configuration_of_another_version_is_named(css_run, css_eval, complains, tmp_path):
    copy = tmp_path / "copied"
    shutil.copytree(css_run, copy)
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text() + "\nfuture: 1\n")
    complains(css_eval(copy), "config.yaml", "future", "another version")


def test_arguments_without_a_name_are_the_checkpoint():
    assert gather(["RUN", "--split", "val"], "checkpoint") == ["--checkpoint=RUN", "--split", "val"]
    assert gather(["--split", "val", "RUN", "--debug"], "checkpoint") == [
        "--split",
        "val",
        "--checkpoint=RUN",
        "--debug",
    ]
    assert gather(["--debug", "RUN", "--out=x"], "checkpoint") == ["--debug", "--checkpoint=RUN", "--out=x"]
    assert gather(["--images", "a", "no", "--out", "x", "--images=b", "RUN"], "checkpoint", "images") == [
        "--out",
        "x",
        "--checkpoint=RUN",
        '--images=["a", "no", "b"]',
    ]
