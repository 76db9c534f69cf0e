"""The memory of whole pictures: names and labels as of their step."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from css.memory import load_memory, make_memory
from css.task import Task
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("_memory_toy", Path(__file__).with_name("_memory_toy.py"))
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

BOTH = {
    "both": [(1, 0, 0, 4, 4), (3, 10, 10, 5, 6), (255, 18, 0, 2, 2)],
    "pieces": [(2, 0, 0, 4, 4), (2, 10, 10, 4, 4)],
}


@pytest.fixture
def task():
    return Task("2-1", 4)


def make(folder, reader, task, step=1, **more):
    return make_memory("images", folder, **toy.facts(reader, task, step, **more))


def test_labels_are_those_of_the_entry_s_own_step(tmp_path, task):
    reader = toy.write(tmp_path / "data", BOTH)
    first = make(tmp_path / "m1", reader, task)
    second = make(tmp_path / "m2", reader, task, 2, previous=first)
    found = {entry.key: entry for entry in second.entries}
    assert {key: entry.classes for key, entry in found.items()} == {
        (0, "both"): (1,),
        (0, "pieces"): (2,),  # no rule on regions
        (1, "both"): (3,),
    }
    mask = reader.load_mask(reader.item("both"))
    for key, channel in (((0, "both"), 1), ((1, "both"), 3)):
        image, label, foreground = found[key].load()
        assert foreground is None
        assert np.array_equal(image, reader.load_image(reader.item("both")))
        assert np.array_equal(label, np.where(mask == channel, channel, np.where(mask == 255, 255, 0)))


def test_labels_are_channels_under_a_permuted_order(tmp_path):
    reader = toy.write(tmp_path / "data", BOTH)
    memory = make(tmp_path / "m", reader, Task("2-1", 4, (3, 1, 4, 2)), setting="overlap")
    entry = memory.entries[0]
    assert (entry.id, entry.classes, entry.raws) == ("both", (2, 1), (1, 3))
    label = entry.load()[1]
    assert (label[0, 0], label[10, 10], label[19, 0], label[0, 20]) == (2, 1, 255, 0)
    assert memory.index["entries"][0]["classes"] == [
        {"channel": 2, "raw": 1, "name": "ant"},
        {"channel": 1, "raw": 3, "name": "cow"},
    ]


def test_the_budget_is_shared_and_the_seed_alone_decides(tmp_path, task):
    reader = toy.write(tmp_path / "data", toy.many())
    first = make(tmp_path / "m1", reader, task)
    second = make(tmp_path / "m2", reader, task, 2, previous=first)
    assert {channel: len(entries) for channel, entries in second.slots.items()} == {1: 2, 2: 2, 3: 2}
    again = make(tmp_path / "m3", reader, task, 2, previous=first)
    assert again.entries == second.entries
    assert make(tmp_path / "m4", reader, task, 2, previous=first, seed=6).entries != second.entries


def test_only_an_index_is_written_and_the_pictures_bytes_are_reported(tmp_path, task):
    reader = toy.write(tmp_path / "data", BOTH)
    memory = make(tmp_path / "m", reader, task)
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["index.json"]
    size = sum(p.stat().st_size for part in ("images", "masks") for p in (tmp_path / "data" / part).iterdir())
    assert memory.image_bytes == memory.stored_bytes == size
    assert f"2 pictures of at most 6, 2 classes, {size / 2**20:.2f} MiB" in memory.summary()


def test_what_does_not_fit_is_refused(tmp_path, task):
    reader = toy.write(tmp_path / "data", BOTH)
    make(tmp_path / "m", reader, task)
    facts = {"reader": reader, "task": task, "fingerprint": "toy-print"}
    with pytest.raises(UserError, match="is of the data set toy"):
        load_memory("images", tmp_path / "m", **{**facts, "fingerprint": "another"})
    with pytest.raises(UserError, match="keeps images, this method replays instances"):
        load_memory("instances", tmp_path / "m", **facts)
    path = tmp_path / "m" / "index.json"
    index = json.loads(path.read_text())
    index["entries"][0]["id"] = "gone"
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="picture gone is not in the training split of toy"):
        load_memory("images", tmp_path / "m", **facts)
    index["entries"][0] = {"id": "both"}
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="is damaged"):
        load_memory("images", tmp_path / "m", **facts)


def test_a_picture_that_is_gone_is_named_and_nothing_is_left(tmp_path, task):
    reader = toy.write(tmp_path / "data", BOTH)
    reader.items("train")
    gone = reader.item("both").image
    gone.unlink()
    with pytest.raises(UserError, match=f"both: {gone} is missing"):
        make(tmp_path / "m", reader, task)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
