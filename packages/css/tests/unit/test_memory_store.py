"""The instance memory's folder: what is in it, what is kept, what is refused, what a kill leaves."""

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from css.data.files import read_image, read_mask
from css.memory import InstanceMemory, load_memory, make_memory
from css.memory.build import build_memory
from css.memory.folder import recover
from css.task import Task
from PIL import Image
from polymodal.errors import UserError

_path = Path(__file__).with_name("_memory_toy.py")
_spec = importlib.util.spec_from_file_location("_memory_toy", _path)
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


@pytest.fixture
def reader(tmp_path):
    return toy.write(tmp_path / "data", toy.many())


@pytest.fixture
def task():
    return Task("2-1", 4)


def make(folder, reader, task, step=1, **more):
    return make_memory("instances", folder, **toy.facts(reader, task, step, **more))


def contents(folder):
    """Every file below a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def shares(memory):
    return {channel: len(entries) for channel, entries in memory.slots.items()}


# ---------------------------------------------------------------- what is kept


def test_the_budget_is_shared_by_the_classes_seen_so_far(tmp_path, reader):
    task = Task("1-1", 4)
    first = make(tmp_path / "m1", reader, task)
    assert shares(first) == {1: 6}
    second = make(tmp_path / "m2", reader, task, 2, previous=first)
    assert shares(second) == {1: 3, 2: 3}
    third = make(tmp_path / "m3", reader, task, 3, previous=second, budget=8)
    assert sorted(shares(third).values()) == [2, 3, 3]
    assert {entry.step for entry in third.slots[3]} == {2}
    for older, newer in ((first, second), (second, third)):
        kept = {entry.key for entry in older.entries}
        assert {entry.key for entry in newer.entries if entry.step < newer.step - 1} <= kept


def test_a_small_data_set_is_kept_whole_and_ends_the_turns(tmp_path, task):
    reader = toy.write(tmp_path / "data", toy.many(2))
    memory = make(tmp_path / "m", reader, task, budget=100)
    assert shares(memory) == {1: 2, 2: 2}
    assert make(tmp_path / "none", reader, task, budget=0).entries == []


def test_the_seed_alone_decides(tmp_path, reader, task):
    for name in ("a", "b"):
        make(tmp_path / name, reader, task)
    make(tmp_path / "c", reader, task, seed=6)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_pictures_where_a_class_is_in_pieces_are_left_out(tmp_path, task):
    pieces = {
        "whole": [(1, 2, 2, 4, 4)],
        "pieces": [(1, 0, 0, 4, 4), (1, 8, 8, 4, 4)],
        "diagonal": [(1, 0, 0, 4, 4), (1, 4, 4, 4, 4)],
        "second": [(1, 0, 0, 4, 4), (2, 8, 8, 2, 2), (2, 12, 12, 2, 2)],
        "later": [(1, 0, 0, 4, 4), (4, 8, 8, 2, 2), (4, 12, 12, 2, 2)],
    }
    reader = toy.write(tmp_path / "data", pieces)
    ids = {entry.id for entry in make(tmp_path / "m", reader, task).entries}
    assert ids == {"whole", "later"}  # cows and dogs have no label yet, and so no pieces
    ids = {entry.id for entry in make(tmp_path / "m", reader, task, connectivity=8).entries}
    assert ids == {"whole", "later", "diagonal"}


def test_entries_have_only_classes_of_their_own_step(tmp_path, task):
    reader = toy.write(tmp_path / "data", {"both": [(1, 0, 0, 4, 4), (3, 10, 10, 5, 6)], "bee": [(2, 2, 2, 4, 4)]})
    first = make(tmp_path / "m1", reader, task)
    assert {entry.id: entry.classes for entry in first.entries} == {"both": (1,), "bee": (2,)}
    second = make(tmp_path / "m2", reader, task, 2, previous=first)
    assert {entry.key: entry.classes for entry in second.entries} == {
        (0, "both"): (1,),
        (0, "bee"): (2,),
        (1, "both"): (3,),
    }
    for entry in second.entries:
        _, label, foreground = entry.load()
        assert set(np.unique(label).tolist()) == {0, *entry.classes}
        assert np.array_equal(foreground, label > 0)


def test_sequential_labels_keep_old_classes(tmp_path, task):
    reader = toy.write(tmp_path / "data", {"both": [(1, 0, 0, 4, 4), (3, 10, 10, 5, 6)]})
    memory = make(tmp_path / "m", reader, task, 2, setting="sequential")
    assert memory.entries[0].classes == (1, 3)


def test_pictures_of_a_step_are_those_of_its_setting(tmp_path, task):
    reader = toy.write(tmp_path / "data", {"both": [(1, 0, 0, 4, 4), (3, 10, 10, 5, 6)], "ant": [(1, 2, 2, 4, 4)]})
    assert {entry.id for entry in make(tmp_path / "m", reader, task).entries} == {"both", "ant"}
    assert {entry.id for entry in make(tmp_path / "m", reader, task, setting="disjoint").entries} == {"ant"}


def test_a_permuted_order_keeps_channels_apart_from_raw_ids(tmp_path, reader):
    task = Task("2-1", 4, (3, 1, 4, 2))
    memory = make(tmp_path / "m", reader, task)
    assert {entry.id[:3] for entry in memory.slots[1]} == {"cow"}
    assert {entry.id[:3] for entry in memory.slots[2]} == {"ant"}
    row = memory.index["entries"][0]
    entry = memory.entries[0]
    raw = task.raw(entry.slot)
    assert row["slot"] == {"channel": entry.slot, "raw": raw, "name": toy.NAMES[raw - 1]}
    assert row["classes"] == [row["slot"]]


# ---------------------------------------------------------------- what is stored


def test_a_stored_instance_is_that_of_the_picture(tmp_path, task):
    reader = toy.write(tmp_path / "data", {"a": [(1, 4, 3, 9, 12), (2, 15, 18, 4, 5)]})
    entry = make(tmp_path / "m", reader, task).entries[0]
    assert entry.box == (4, 3, 15, 20)
    assert entry.size == toy.SIZE
    source, mask = reader.load_image(reader.item("a")), reader.load_mask(reader.item("a"))
    image, label, foreground = entry.load()
    assert np.array_equal(label, mask)
    assert np.array_equal(foreground, mask > 0)
    assert np.array_equal(image[foreground], source[foreground])
    pixels, channels = entry.crop()
    assert np.array_equal(channels, mask[4:19, 3:23])
    rows, columns = np.nonzero(mask)
    distance = np.abs(np.arange(20)[:, None, None] - rows), np.abs(np.arange(24)[None, :, None] - columns)
    near = (np.maximum(*distance).min(-1) <= 3)[4:19, 3:23]
    assert np.array_equal(pixels[near], source[4:19, 3:23][near])  # the rim that resizing mixes into the edge
    assert (~near).any()
    assert not pixels[~near].any()
    assert np.array_equal(image[0, 3:23], pixels[0])  # around the box its outermost pixels are repeated
    assert np.array_equal(image[4:19, 0], pixels[:, 0])
    assert np.array_equal(image[19, 23], pixels[-1, -1])


def test_ignored_pixels_are_not_stored(tmp_path, task):
    reader = toy.write(tmp_path / "data", {"a": [(255, 0, 0, 20, 24), (1, 5, 5, 6, 6)]})
    entry = make(tmp_path / "m", reader, task).entries[0]
    assert entry.box == (5, 5, 6, 6)
    assert set(np.unique(entry.load()[1]).tolist()) == {0, 1}


def test_the_folder_can_be_read_without_this_package(tmp_path, reader, task):
    memory = make(tmp_path / "m", reader, task)
    index = json.loads((tmp_path / "m" / "index.json").read_text())
    assert {key: index[key] for key in ("schema_version", "kind", "step", "budget", "seed", "connectivity")} == {
        "schema_version": 1,
        "kind": "instances",
        "step": 1,
        "budget": 6,
        "seed": 5,
        "connectivity": 4,
    }
    assert index["data"] == {"name": "toy", "fingerprint": "toy-print"}
    assert index["task"] == {"name": "2-1", "num_classes": 4, "order": [1, 2, 3, 4]}
    for row, entry in zip(index["entries"], memory.entries, strict=True):
        top, left, height, width = row["box"]
        image, mask = read_image(tmp_path / "m" / row["image"]), read_mask(tmp_path / "m" / row["mask"])
        assert image.shape == (height, width, 3)
        assert top + height <= row["source_size"][0]
        assert left + width <= row["source_size"][1]
        assert set(np.unique(mask).tolist()) <= {0, row["slot"]["channel"]}
        assert row["id"] == entry.id
        assert row["id"] in row["image"]
        assert row["step"] == 0
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["images", "index.json", "masks"]


def test_bytes_are_those_of_the_files(tmp_path, task):
    reader = toy.write(tmp_path / "data", {"both": [(1, 0, 0, 4, 4), (3, 10, 10, 5, 6)], "ant": [(1, 2, 2, 4, 4)]})
    first = make(tmp_path / "m1", reader, task)
    memory = make(tmp_path / "m2", reader, task, 2, previous=first)
    assert [entry.id for entry in memory.entries].count("both") == 2
    files = [p for part in ("images", "masks") for p in (tmp_path / "m2" / part).iterdir()]
    assert memory.stored_bytes == sum(p.stat().st_size for p in files) > 0
    sources = [p for part in ("images", "masks") for p in (tmp_path / "data" / part).iterdir()]
    assert memory.image_bytes == sum(p.stat().st_size for p in sources)  # "both" counts once
    text = memory.summary()
    assert "memory of step 2: 3 instances of at most 6, 2 classes" in text
    assert f"{memory.stored_bytes / 2**20:.2f} MiB (their whole pictures: {memory.image_bytes / 2**20:.2f} MiB)" in text


def test_names_of_pictures_may_have_any_characters(tmp_path, task):
    reader = toy.write(tmp_path / "data", {"a": [(1, 0, 0, 4, 4)], "b": [(1, 0, 0, 4, 4)]})
    items = {item.id: item for item in reader.items("train")}
    names = {"x/y": items["a"], "x y": items["b"]}
    pictures = [(replace(item, id=name), (1,)) for name, item in names.items()]
    memory = build_memory(
        tmp_path / "m",
        reader=reader,
        task=task,
        step=1,
        pictures=pictures,
        lut=task.train_lut(0),
        previous=None,
        budget=5,
        seed=0,
    )
    assert {entry.id for entry in memory.entries} == {"x/y", "x y"}
    assert len({entry.image for entry in memory.entries}) == 2


@pytest.mark.parametrize("links", [True, False])
def test_kept_entries_are_linked_or_copied(tmp_path, reader, task, links, monkeypatch):
    first = make(tmp_path / "m1", reader, task)
    if not links:

        def refuse(*_):
            raise OSError(errno.EXDEV, "another file system")

        monkeypatch.setattr(os, "link", refuse)
    second = make(tmp_path / "m2", reader, task, 2, previous=first)
    before = {entry.key: entry for entry in first.entries}
    kept = [entry for entry in second.entries if entry.key in before]
    assert len(kept) == 4
    for entry in kept:
        for now, then in ((entry.image, before[entry.key].image), (entry.mask, before[entry.key].mask)):
            assert now.read_bytes() == then.read_bytes()
            assert (now.stat().st_ino == then.stat().st_ino) is links
    shutil.rmtree(tmp_path / "m1")
    shutil.rmtree(tmp_path / "data")
    for entry in second.entries:
        entry.load()  # neither the older memory nor the data of the step are needed


# ---------------------------------------------------------------- what is refused


def refused(folder, reader, task, **change):
    arguments = {"reader": reader, "task": task, "fingerprint": reader.fingerprint(), **change}
    with pytest.raises(UserError) as error:
        load_memory("instances", folder, **arguments)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


def edit(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_memory_of_something_else_is_refused(tmp_path, reader, task):
    make(tmp_path / "m", reader, task)
    assert load_memory("instances", tmp_path / "m", reader=reader, task=task, fingerprint="toy-print").entries
    text = refused(tmp_path / "m", reader, task, fingerprint="another")
    assert "is of the data set toy (toy-print), this run's is another" in text
    assert "is of task 2-1, this run of 1-1" in refused(tmp_path / "m", reader, Task("1-1", 4))
    assert "is of task 2-1, this run of 2-1" in refused(tmp_path / "m", reader, Task("2-1", 3))
    assert "the same task with another class order" in refused(tmp_path / "m", reader, Task("2-1", 4, (2, 1, 3, 4)))
    edit(tmp_path / "m", kind="images")
    assert "keeps images, this method replays instances" in refused(tmp_path / "m", reader, task)
    edit(tmp_path / "m", kind="instances", schema_version=2)
    assert "schema version 2 is newer than 1; update css" in refused(tmp_path / "m", reader, task)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"schema_version": 1, "kind": "instances", "task": {}, "data": []}']
)
def test_a_damaged_index_is_refused(tmp_path, reader, task, content):
    make(tmp_path / "m", reader, task)
    (tmp_path / "m" / "index.json").write_text(content)
    assert "index.json is damaged" in refused(tmp_path / "m", reader, task)


@pytest.mark.parametrize("rows", [[{}], [3], "text", None])
def test_damaged_entries_are_refused(tmp_path, reader, task, rows):
    make(tmp_path / "m", reader, task)
    edit(tmp_path / "m", entries=rows)
    assert "is damaged" in refused(tmp_path / "m", reader, task)


def test_missing_files_are_named(tmp_path, reader, task):
    memory = make(tmp_path / "m", reader, task)
    memory.entries[1].mask.unlink()
    assert memory.entries[1].mask.name in refused(tmp_path / "m", reader, task)
    assert "index.json is missing" in refused(tmp_path / "nothing", reader, task)


def test_a_broken_or_exchanged_picture_is_named(tmp_path, reader, task):
    entry = make(tmp_path / "m", reader, task).entries[0]
    entry.mask.write_bytes((reader.item("ant0").mask).read_bytes())
    with pytest.raises(UserError, match="is damaged .*the index says"):
        entry.load()
    entry.image.write_bytes(b"no picture")
    with pytest.raises(UserError, match=entry.image.name):
        entry.crop()


def test_a_mask_of_another_size_is_named_and_the_old_memory_stays(tmp_path, reader, task):
    make(tmp_path / "m", reader, task)
    before = contents(tmp_path / "m")
    for item in reader.items("train"):
        Image.fromarray(np.pad(reader.load_mask(item), 1)).save(item.mask)
    with pytest.raises(UserError, match="ant.*24 x 20 pixels, mask"):
        make(tmp_path / "m", reader, Task("1-1", 4))
    assert contents(tmp_path / "m") == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


# ---------------------------------------------------------------- what interruptions leave


def test_a_full_disk_leaves_the_old_memory(tmp_path, reader, task, monkeypatch):
    first = make(tmp_path / "m", reader, task)
    before = contents(tmp_path / "m")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        make(tmp_path / "m", reader, task, 2, previous=first)
    assert contents(tmp_path / "m") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "m"]


def test_a_new_memory_replaces_the_old_one_whole(tmp_path, reader, task):
    make(tmp_path / "m", reader, task)
    (tmp_path / "m" / "stray.txt").write_text("of the old one")
    make(tmp_path / "m", reader, task, seed=6)
    make(tmp_path / "other", reader, task, seed=6)
    assert contents(tmp_path / "m") == contents(tmp_path / "other")


OLD = ("writing", "before rename 1", "after rename 1", "before rename 2")


@pytest.mark.parametrize("moment", [*OLD, "after rename 2", "never"])
def test_a_kill_leaves_the_old_memory_or_the_new_one(tmp_path, reader, task, moment):
    folder = tmp_path / "m"
    first = make(folder, reader, task)
    before = contents(folder)
    make(tmp_path / "new", reader, task, 2, previous=first, seed=7)
    command = [sys.executable, str(_path), str(tmp_path / "data"), str(folder), moment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (0 if moment == "never" else -9), done.stderr
    found = load_memory("instances", folder, reader=reader, task=task, fingerprint="toy-print")
    for entry in found.entries:
        entry.load()
    assert contents(found.folder) == (before if moment in OLD else contents(tmp_path / "new"))
    previous = InstanceMemory.load(folder)
    again = make(folder, reader, task, previous=None) if moment in OLD else previous
    assert shares(again)
    recover(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "m", "new"]
    assert contents(folder) == (before if moment in OLD else contents(tmp_path / "new"))


def test_reading_changes_nothing(tmp_path, reader, task):
    make(tmp_path / "m", reader, task)
    (tmp_path / "m").rename(tmp_path / ".m.before")
    (tmp_path / ".m.unfinished").mkdir()
    memory = InstanceMemory.load(tmp_path / "m")  # another process may be about to finish
    assert memory.folder == tmp_path / ".m.before"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.before", ".m.unfinished", "data"]
    recover(tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "m"]
