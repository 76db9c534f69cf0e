"""The shared contract of data: readers of every layout, and the loaders on top of them."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from css.data import SPLITS, reader_class
from css.data.datamodule import CSSDataModule
from css.data.options import LoaderConfig
from css.memory.build import make_memory
from css.task import Task
from polymodal import checks
from polymodal.errors import UserError

spec = importlib.util.spec_from_file_location("css_test_layouts", Path(__file__).parents[1] / "_layouts.py")
layouts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layouts)

SCRIPT = """
import json, sys
from css.data import reader_class
name, options = json.loads(sys.argv[1])
print(reader_class(name)(**options).fingerprint())
assert "torch" not in sys.modules, "reading class sets loads torch"
"""
TASKS = {"shapes": Task("2-1", 4), "pairs": Task("2-2", 4), "voc": Task("15-5", 20), "ade20k": Task("100-50", 150)}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """Reader name -> options of a reader on generated data, and options under which the data count as other data."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("data")
        patch.setenv("POLYMODAL_CACHE", str(folder / "cache"))
        voc, less_voc = layouts.write_voc(folder / "a"), layouts.write_voc(folder / "b", train=21)
        ade, less_ade = layouts.write_ade(folder / "c"), layouts.write_ade(folder / "d", train=13)
        pairs, less_pairs = layouts.write_pairs(folder / "e", val=3), layouts.write_pairs(folder / "f", train=9, val=3)
        worlds = {"root": str(folder / "worlds"), "images": (16, 6, 6)}
        yield {
            "shapes": (worlds, [{**worlds, "world_seed": 1}, {**worlds, "noise": 0.1}]),
            "voc": ({"root": str(voc), "val_share": 0.2}, [{"root": str(voc)}, {"root": str(less_voc)}]),
            "ade20k": ({"root": str(ade), "val_share": 0.2}, [{"root": str(ade)}, {"root": str(less_ade)}]),
            "pairs": ({"root": str(pairs)}, [{"root": str(less_pairs)}]),
        }


every_reader = pytest.mark.parametrize("name", list(TASKS))


def data_module(readers, name, workers=0, step=1, **options):
    reader = reader_class(name)(**readers[name][0])
    config = LoaderConfig(batch_size=3, eval_batch_size=4, crop=32, num_workers=workers)
    return CSSDataModule(reader, TASKS[name], "overlap", step, config, seed=3, **options)


@pytest.fixture(scope="module", params=["instances", "images"])
def entries(request, readers, tmp_path_factory):
    """What step 1 of the shapes world replays."""
    reader = reader_class("shapes")(**readers["shapes"][0])
    reader.prepare()
    memory = make_memory(
        request.param,
        tmp_path_factory.mktemp("memory") / "memory",
        reader=reader,
        task=TASKS["shapes"],
        fingerprint=reader.fingerprint(),
        step=1,
        setting="overlap",
        previous=None,
        budget=5,
        seed=0,
        split_seed=0,
    )
    assert len(memory.entries) == 5
    return memory.entries


@every_reader
def test_splits_are_disjoint(readers, name):
    reader = reader_class(name)(**readers[name][0])
    found = {split: [item.id for item in reader.items(split)] for split in SPLITS}
    checks.check_disjoint_splits({split: ids for split, ids in found.items() if ids or split != "val"})


@every_reader
def test_fingerprint_is_stable(readers, name):
    options, changed = readers[name]
    build = reader_class(name)
    here = checks.check_stable_fingerprint(lambda: build(**options), *(lambda o=o: build(**o) for o in changed))
    settings = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", SCRIPT, json.dumps([name, options])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == here


@every_reader
def test_training_sampler_can_go_on_in_mid_epoch(readers, name):
    checks.check_train_sampler(data_module(readers, name))


@pytest.mark.parametrize("mix", ["concat", "half"])
def test_so_it_can_with_a_memory(readers, entries, mix):
    checks.check_train_sampler(data_module(readers, "shapes", replay=entries, mix=mix))


@pytest.mark.parametrize("name", ["pairs", "voc", "ade20k"])
def test_epochs_can_be_drawn_in_any_order(readers, name):
    checks.check_same_batches(lambda workers: data_module(readers, name, workers), workers=(0, 0))


def test_workers_change_nothing(readers, entries):
    def make(workers):
        return data_module(readers, "shapes", workers, replay=entries, mix="half")

    checks.check_same_batches(make, workers=(0, 2))


def test_a_broken_picture_in_a_worker_is_one_line_that_names_it(readers, tmp_path):
    options = {**readers["shapes"][0], "root": str(tmp_path)}
    reader = reader_class("shapes")(**options)
    reader.class_sets("train")  # indexed while whole
    config = LoaderConfig(batch_size=2, crop=32, num_workers=1)
    data = CSSDataModule(reader, Task("offline", 4), "overlap", 0, config)
    data.setup("fit")
    last = data.train_items()[list(data.train_sampler)[-1][0][0]]
    last.image.write_bytes(last.image.read_bytes()[:200])
    met = []
    with pytest.raises(UserError) as caught:
        met.extend(data.train_dataloader())
    assert len(met) == len(data.train_sampler) - 1  # it was met in the middle of the epoch, not before
    assert str(caught.value).startswith(f"image {last.image} cannot be read")
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path)
