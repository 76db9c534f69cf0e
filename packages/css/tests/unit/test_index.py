"""The index of class sets, and readers by name."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from css.data import READERS, Item, SegData, reader_class
from css.data.files import read_mask
from css.data.index import class_sets
from PIL import Image
from polymodal.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path_factory.mktemp("cache")))


class Folder(SegData):
    """Masks of a folder; counts how often one is decoded."""

    name = "folder"

    def __init__(self, root, classes=5, repeat=1):
        super().__init__(root)
        self.classes, self.repeat, self.reads = classes, repeat, 0

    def class_names(self):
        return [f"c{k}" for k in range(self.classes)]

    def read_split(self, split):
        if split != "train":
            return []
        paths = sorted(self.root.glob("*.png"))
        return [Item(f"{path.stem}-{k}", path, path) for k in range(self.repeat) for path in paths]

    def load_mask(self, item):
        self.reads += 1
        return read_mask(item.mask, self.num_classes)


def fill(folder, sets):
    for number, ids in enumerate(sets):
        mask = np.zeros((6, 7), np.uint8)
        mask[0] = 255
        for row, value in enumerate(ids, start=1):
            mask[row, row:] = value
        Image.fromarray(mask).save(folder / f"{number:03d}.png")


SETS = [(1, 3), (), (2,), (5, 4, 1), (3,)]


def test_sets_are_sorted_without_background_and_ignored(tmp_path):
    fill(tmp_path, SETS)
    assert Folder(tmp_path).class_sets("train") == [tuple(sorted(ids)) for ids in SETS]
    assert Folder(tmp_path).class_sets("val") == []


def test_the_second_time_no_mask_is_opened(tmp_path):
    fill(tmp_path, SETS)
    first, second = Folder(tmp_path), Folder(tmp_path)
    expected = class_sets(first, "train")
    assert class_sets(second, "train") == expected
    assert (first.reads, second.reads) == (len(SETS), 0)


def test_a_reader_keeps_what_it_found(tmp_path):
    fill(tmp_path, SETS)
    reader = Folder(tmp_path)
    before = class_sets(reader, "train")
    Image.fromarray(np.full((6, 7), 4, np.uint8)).save(tmp_path / "001.png")
    assert class_sets(reader, "train") is before
    assert class_sets(Folder(tmp_path), "train") != before


def test_a_changed_mask_is_seen(tmp_path):
    fill(tmp_path, SETS)
    class_sets(Folder(tmp_path), "train")
    path = tmp_path / "001.png"
    Image.fromarray(np.full((6, 7), 4, np.uint8)).save(path, compress_level=0)
    assert class_sets(Folder(tmp_path), "train")[1] == (4,)
    before = path.stat()
    Image.fromarray(np.full((6, 7), 2, np.uint8)).save(path, compress_level=0)
    assert path.stat().st_size == before.st_size  # so only the time stamp tells, and it may be an older one
    os.utime(path, ns=(before.st_mtime_ns - 10**9, before.st_mtime_ns - 10**9))
    assert class_sets(Folder(tmp_path), "train")[1] == (2,)


def test_a_mask_more_or_less_is_seen(tmp_path):
    fill(tmp_path, SETS)
    class_sets(Folder(tmp_path), "train")
    fill(tmp_path, [*SETS, (2, 4)])
    assert class_sets(Folder(tmp_path), "train")[-1] == (2, 4)
    (tmp_path / "000.png").unlink()
    assert len(class_sets(Folder(tmp_path), "train")) == len(SETS)


def test_another_number_of_classes_is_checked_again(tmp_path):
    fill(tmp_path, SETS)
    class_sets(Folder(tmp_path, classes=5), "train")
    with pytest.raises(UserError, match=r"003\.png: unknown id 5 in"):
        class_sets(Folder(tmp_path, classes=4), "train")


def test_a_broken_mask_ends_the_pass_with_its_name_and_nothing_is_cached(tmp_path):
    fill(tmp_path, SETS)
    whole = (tmp_path / "002.png").read_bytes()
    (tmp_path / "002.png").write_bytes(whole[:40])
    reader = Folder(tmp_path, repeat=200)
    with pytest.raises(UserError, match=r"mask .*002\.png cannot be read"):
        class_sets(reader, "train", workers=2)
    assert reader.reads < 900
    (tmp_path / "002.png").write_bytes(whole)
    assert class_sets(Folder(tmp_path), "train")[2] == (2,)


def test_a_mask_that_vanished_is_named(tmp_path):
    fill(tmp_path, SETS)
    reader = Folder(tmp_path)
    reader.items("train")
    (tmp_path / "004.png").unlink()
    with pytest.raises(UserError, match=r"mask .*004\.png is missing"):
        class_sets(reader, "train")


def test_masks_are_decoded_at_the_same_time_and_stay_in_order(tmp_path):
    fill(tmp_path, SETS[:4])
    together = threading.Barrier(2, timeout=20)

    class Waiting(Folder):
        def load_mask(self, item):
            together.wait()  # passes only when two threads are here
            return super().load_mask(item)

    assert class_sets(Waiting(tmp_path), "train", workers=2) == [tuple(sorted(ids)) for ids in SETS[:4]]


def test_ten_thousand_masks_are_read_from_the_cache_in_a_second(tmp_path):
    fill(tmp_path, SETS)
    first, again = Folder(tmp_path, repeat=2000), Folder(tmp_path, repeat=2000)
    expected = class_sets(first, "train")
    again.items("train")
    start = time.perf_counter()
    found = class_sets(again, "train")
    assert time.perf_counter() - start < 1
    assert (len(found), again.reads) == (10_000, 0)
    assert found == expected


def test_another_annotation_has_another_fingerprint(tmp_path):
    fill(tmp_path, SETS)
    before = Folder(tmp_path).fingerprint()
    assert Folder(tmp_path).fingerprint() == before
    fill(tmp_path, [(1, 2), *SETS[1:]])
    assert Folder(tmp_path).fingerprint() != before


# --- readers by name ------------------------------------------------------------------------------------------------


def test_readers_are_found_by_name():
    for name in READERS:
        found = reader_class(name)
        assert issubclass(found, SegData)
        assert found.name == name
    with pytest.raises(UserError, match="unknown data 'vocc'; did you mean voc"):
        reader_class("vocc")


def test_readers_load_no_torch():
    modules = "voc, ade, pairs, scenarios, split_files, index, files, names"
    code = f"from css.data import {modules}; import sys; print('torch' in sys.modules, 'lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
