"""``css-data``: split files, tables of steps, every kind of wrong file, memories."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from css.data.pairs import Pairs
from css.data.split_files import step_indices
from css.memory import make_memory
from css.task import Task
from PIL import Image


@pytest.fixture
def pairs(tmp_path, layouts):
    """Eight and four pictures of 48 x 64, two classes each."""
    return Pairs(root=layouts.write_pairs(tmp_path / "pairs"))


@pytest.fixture
def named(pairs):
    """The options that name these data."""
    return ["--data", "pairs", "--data.root", pairs.root]


def cells(text):
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def classes_of(item):
    return sorted(set(np.asarray(Image.open(item.mask)).ravel().tolist()) - {0, 255})


# ------------------------------------------------------------------ commands


def test_help_and_unknown_commands(css_data):
    assert css_data().code == 2
    result = css_data("--help")
    assert result.code == 0
    for name in ("prepare", "show", "check", "memory"):
        assert f"  {name} " in result.out
    for name in ("prepare", "show", "check"):
        assert f"usage: css-data {name}" in css_data(name, "--help").out
    assert "usage: css-data memory show" in css_data("memory", "show", "--help").out
    assert css_data("memory", "--help").code == 0
    assert css_data("memory").code == css_data("memory", "draw").code == css_data("nonsense").code == 2


# ------------------------------------------------------------------ prepare and show


def test_split_files_give_the_steps_that_were_written(pairs, named, css_data, tmp_path):
    out = tmp_path / "splits"
    result = css_data("prepare", *named, "--task", "2-1", "--setting", "disjoint", "--order", "[4,3,2,1]", "--out", out)
    assert result.code == 0, result.err
    assert len(list(out.iterdir())) == 6
    assert "train: 8 masks indexed" in result.out
    assert f"--data.split_files {out}" in result.out
    task = Task("2-1", 4, (4, 3, 2, 1))
    other = Pairs(root=pairs.root, split_files=out)
    for step in range(3):
        for split in ("train", "test"):
            wanted = step_indices(pairs, task, "disjoint", step, split)
            assert step_indices(other, task, "disjoint", step, split) == wanted
            assert int(cells(result.out)[str(step)][1 if split == "train" else 2]) == len(wanted)


def test_preparing_without_a_folder_writes_none(css_data, named, tmp_path):
    result = css_data("prepare", *named, "--task", "2-1")
    assert result.code == 0
    assert "use them" not in result.out
    assert not (tmp_path / "splits").exists()


@pytest.mark.parametrize("setting", ["overlap", "disjoint", "sequential", "partitioned"])
def test_shown_counts_are_those_of_a_loop(pairs, named, css_data, setting):
    result = css_data("show", *named, "--task", "2-1", "--setting", setting, "--seed", 1)
    assert result.code == 0, result.err
    table, task = cells(result.out), Task("2-1", 4)
    steps = [[pairs.items("train")[i] for i in step_indices(pairs, task, setting, s, "train", 1)] for s in range(3)]
    for raw, name in enumerate(pairs.class_names(), start=1):
        learnt = (0, 0, 1, 2)[raw - 1]
        known = [s for s in range(3) if s == learnt or (setting == "sequential" and s > learnt)]
        labelled = sum(raw in classes_of(item) for s in known for item in steps[s])
        every = sum(raw in classes_of(item) for chosen in steps for item in chosen)
        tested = sum(raw in classes_of(item) for item in pairs.items("test"))
        assert table[name] == [str(raw), str(learnt), str(labelled), str(every - labelled), str(tested)]
    assert [table[str(s)][:2] for s in range(3)] == [[str((2, 1, 1)[s]), str(len(steps[s]))] for s in range(3)]


def test_shown_pictures_have_the_annotation_and_the_label_of_the_step(pairs, css_data, tmp_path, monkeypatch, named):
    from css import pictures

    drawn = []
    whole = pictures.prediction_grid
    monkeypatch.setattr(pictures, "prediction_grid", lambda shown, *more: drawn.append(shown) or whole(shown, *more))
    result = css_data("show", *named, "--task", "2-1", "--order", "[3,1,4,2]", "--out", tmp_path / "p", "--pictures", 3)
    assert result.code == 0, result.err
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["step0.png", "step1.png", "step2.png"]
    for shown, kept in zip(drawn, ((3, 1), (4,), (2,)), strict=True):
        assert len(shown) == 3
        for item in shown:
            want = np.where(np.isin(item.truth, (*kept, 255)), item.truth, 0)
            assert np.array_equal(item.prediction, want)
            assert want.any()


def test_the_task_of_known_data_is_known(css_data, named, complains, layouts, tmp_path):
    result = css_data("show", "--data", "shapes", "--data.images", "[12, 6, 6]")
    assert result.code == 0
    assert "task 2-1" in result.out
    complains(css_data("show", *named), "--task is missing", "4 classes")
    complains(css_data("show", *named, "--task", "3-2"), "does not fit 4 classes")
    complains(css_data("show", *named, "--task", "2-1", "--order", "[1,2,3]"), "class order")
    complains(css_data("prepare", "--data", "voc"), "no root folder")
    voc = layouts.write_voc(tmp_path / "voc", train=40, test=20)
    result = css_data("show", "--data", "voc", "--data.root", voc)
    assert result.code == 0, result.err
    assert "task 15-1, overlap: 20 classes in 6 steps" in result.out


def test_a_step_without_pictures_is_named(css_data, layouts, complains, tmp_path):
    root = layouts.write_pairs(tmp_path / "few", train=1)
    complains(css_data("prepare", "--data", "pairs", "--data.root", root, "--task", "1-1"), "no training picture")


# ------------------------------------------------------------------ check


def test_sound_data_pass(named, css_data):
    result = css_data("check", *named)
    assert result.code == 0, result.err
    assert "train: 8 pictures, 0 with problems" in result.out
    assert "all files can be used" in result.out
    assert "note" not in result.out


def test_every_wrong_file_is_named(pairs, named, css_data, complains):
    items = pairs.items("train")
    mask = np.asarray(Image.open(items[0].mask)).copy()
    mask[0, 0] = 9
    Image.fromarray(mask).save(items[0].mask)
    Image.fromarray(mask[:, :-3]).save(items[1].mask)
    items[2].mask.write_bytes(items[2].mask.read_bytes()[:-30])
    items[3].image.write_bytes(b"no picture")
    Image.new("RGB", (64, 48)).save(pairs.items("test")[0].mask)
    result = css_data("check", *named)
    complains(result, "5 of the pictures of pairs")
    lines = [line for line in result.out.splitlines() if line.startswith("  ")]
    wanted = [("train", items[0].mask, "id"), ("train", items[1].mask, ""), ("train", items[2].mask, "cannot be read")]
    wanted += [("train", items[3].image, "cannot be read"), ("test", pairs.items("test")[0].mask, "colour")]
    for line, (split, path, says) in zip(lines, wanted, strict=True):
        assert line.strip().startswith(split)
        assert str(path) in line
        assert says in line
    assert "train: 8 pictures, 4 with problems" in result.out
    assert "test: 4 pictures, 1 with problems" in result.out


def test_masks_alone_can_be_checked(pairs, named, css_data):
    pairs.items("train")[0].image.write_bytes(b"no picture")
    assert css_data("check", *named).code == 2
    assert css_data("check", *named, "--images", "false", "--workers", 2).code == 0


def test_absent_classes_and_shared_pictures_are_noted(pairs, named, css_data):
    (pairs.root / "classes.txt").write_text("\n".join([*pairs.class_names(), "moon"]) + "\n")
    train, test = pairs.items("train")[0], pairs.items("test")[0]
    for source, near in ((train.image, test.image), (train.mask, test.mask)):
        shutil.copy(source, near.with_name(source.name))
    result = css_data("check", *named)
    assert result.code == 0, result.err
    assert "1 of 5 classes never occur in train: moon" in result.out
    assert f"1 pictures are in train and in test, e.g. {train.id}" in result.out


def test_a_missing_file_ends_the_check(pairs, named, css_data, complains):
    pairs.items("test")[0].mask.unlink()
    complains(css_data("check", *named), str(pairs.items("test")[0].mask.stem))


def test_the_console_script_checks(pairs):
    pairs.items("train")[1].mask.write_bytes(b"")
    command = [Path(sys.executable).with_name("css-data"), "check", "--data", "pairs", "--data.root", pairs.root]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert str(pairs.items("train")[1].mask) in done.stdout
    assert len(done.stderr.strip().splitlines()) == 1


# ------------------------------------------------------------------ memory


def test_a_runs_memory_is_told_and_drawn(css_run, css_data, tmp_path):
    index = json.loads((css_run / "steps" / "02" / "memory" / "index.json").read_text())
    result = css_data("memory", "show", css_run, "--out", tmp_path / "memory.png")
    assert result.code == 0, result.err
    table = cells(result.out)
    for name in ("disc", "square", "triangle"):
        mine = [row for row in index["entries"] if row["slot"]["name"] == name]
        assert table[name][:2] == [str(mine[0]["slot"]["raw"]), str(len(mine))]
        assert table[name][2] == ", ".join(sorted({str(row["step"]) for row in mine}))
        assert table[name][3] == f"{sum(row['bytes'] for row in mine) / 1024:.1f}"
    assert table["all"][3] == f"{sum(row['bytes'] for row in index['entries']) / 1024:.1f}"
    with Image.open(tmp_path / "memory.png") as image:
        assert image.size[0] > 400
    assert "8 instances of at most 8" in result.out


def test_a_memory_is_drawn_beside_itself(css_run, css_data, tmp_path):
    copy = tmp_path / "01"
    shutil.copytree(css_run / "steps" / "01", copy)
    for place in (copy, copy / "memory"):
        (copy / "memory.png").unlink(missing_ok=True)
        result = css_data("memory", "show", place, "--entries", 3)
        assert result.code == 0, result.err
        assert "memory of step 1" in result.out
        assert (copy / "memory.png").is_file()
    (copy / "memory.png").unlink()
    assert css_data("memory", "show", copy, "--entries", 0).code == 0
    assert not (copy / "memory.png").exists()


def test_a_memory_of_whole_pictures_finds_them_in_the_data(pairs, named, css_data, complains, tmp_path):
    task, folder = Task("2-1", 4, (3, 1, 4, 2)), tmp_path / "memory"
    facts = {"reader": pairs, "task": task, "fingerprint": pairs.fingerprint(), "setting": "overlap", "budget": 4}
    made = make_memory("images", folder, **facts, step=1, previous=None, seed=0, split_seed=0)
    complains(css_data("memory", "show", folder), str(folder), "--data.root")
    result = css_data("memory", "show", folder, *named)
    assert result.code == 0, result.err
    table = cells(result.out)
    assert {name for name in ("bar", "disc") if name in table} == {"bar", "disc"}
    sizes = {entry.id: entry.item.image.stat().st_size + entry.item.mask.stat().st_size for entry in made.entries}
    assert table["all"][4] == f"{sum(sizes.values()) / 1024:.1f}"
    assert (tmp_path / "memory.png").is_file()


def test_a_missing_or_damaged_memory_is_one_line(css_run, css_data, complains, tmp_path):
    complains(css_data("memory", "show"), "no folder given")
    complains(css_data("memory", "show", tmp_path / "gone"), "no memory there")
    complains(css_data("memory", "show", css_run / "steps" / "00"), "no memory there")
    complains(css_data("memory", "show", css_run, "--out", tmp_path / "memory.txt"), "--out", ".png")
    shutil.copytree(css_run / "steps" / "01" / "memory", tmp_path / "memory")
    for text in ("{", "[]", '{"schema_version": 1}'):
        (tmp_path / "memory" / "index.json").write_text(text)
        complains(css_data("memory", "show", tmp_path / "memory"), "index.json", "damaged")
