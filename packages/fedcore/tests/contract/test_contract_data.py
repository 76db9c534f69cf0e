"""What every reader of the table promises."""

import csv
import dataclasses
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fedcore.batches import ClientData
from fedcore.data import READERS, FedData, reader_class
from polymodal.errors import UserError


def load_layouts(file):
    """A module of files' writers beside the tests."""
    spec = importlib.util.spec_from_file_location(f"fed_contract{file[:-3]}", Path(__file__).parents[1] / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


layouts, texts = load_layouts("_data_layouts.py"), load_layouts("_text_layouts.py")


def options_for(name, folder):
    """Options of a reader, its files being in ``folder``."""
    if name == "digits":
        return {}
    if name in texts.WRITERS:
        return {"root": texts.WRITERS[name](folder)[0]}
    if name in ("fashion_mnist", "mnist"):
        return {"root": layouts.fashion(folder)[0], "augment": True}
    if name in ("cifar10", "cifar100", "tiny_imagenet", "stl10", "svhn", "domainnet"):
        made = getattr(layouts, name)(folder)
        small = {"image_size": 16} if name == "domainnet" else {"augment": True}
        return {"root": made[0] if isinstance(made, tuple) else made, **small}
    if name == "text_domains":
        return {"root": layouts.text_domains(folder)}
    if name.startswith("glue"):
        return {"root": layouts.glue(folder)}
    rng = np.random.default_rng(0)
    if name == "npz":
        path = folder / "own.npz"
        images = rng.integers(0, 256, (40, 3, 8, 8)).astype(np.uint8)
        np.savez(path, x=images, y=np.arange(40) % 4, client=np.arange(40) % 3)
        return {"root": path, "augment": True}
    path = folder / "own.csv"
    with path.open("w", newline="") as handle:
        rows = [[round(a, 3), round(b, 3), i % 4, "uvw"[i % 3]] for i, (a, b) in enumerate(rng.normal(size=(40, 2)))]
        csv.writer(handle).writerows([["a", "b", "label", "who"], *rows])
    return {"root": path, "client": "who"}


@pytest.fixture(params=list(READERS))
def case(request, tmp_path, monkeypatch):
    """Class of a reader and its options."""
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    return reader_class(request.param), options_for(request.param, tmp_path / "files")


def test_splits_fit_the_promises(case):
    made, options = case
    data = made(**options)
    data.check()
    assert isinstance(data, FedData)
    for split in data.splits:
        found = data.load(split)
        assert found is data.load(split)
        inputs, targets = found.batch(torch.arange(len(found)))
        assert len(inputs) == len(targets) == len(found) > 0
        if data.regression:
            assert (targets.dtype, data.num_classes) == (torch.float32, 1)
        else:
            assert targets.dtype == torch.int64
            assert 0 <= int(targets.min()) <= int(targets.max()) < data.num_classes == len(data.class_names())
        if data.vocabulary:
            assert 0 <= int(inputs.min()) <= int(inputs.max()) < data.vocabulary
            assert found.input_shape[0] >= inputs.shape[1]
        else:
            assert inputs.dtype == torch.float32
            assert found.input_shape == tuple(inputs.shape[1:])
        assert inputs.isfinite().all()
    labels = data.partition_labels()
    assert labels.dtype == np.int64
    assert len(labels) == len(data.load("train"))
    with pytest.raises(UserError, match="split 'val'; expected one of train, test"):
        data.load("val")


def test_fresh_readers_agree_and_describe_themselves(case):
    made, options = case
    one, other = made(**options), made(**options)
    assert one.fingerprint() == other.fingerprint()
    described = one.describe()
    assert described["samples"] == {split: len(one.load(split)) for split in one.splits}
    assert described["fingerprint"] == one.fingerprint()
    assert described["name"]


def test_another_label_is_another_fingerprint(case):
    made, options = case
    one, other = made(**options), made(**options)
    other.load("train").targets[0] += 1
    assert one.fingerprint() != other.fingerprint()


def test_nothing_is_drawn_without_a_generator_and_nothing_in_test_batches(case):
    made, options = case
    data = made(**options)
    for split in data.splits:
        found, indices = data.load(split), torch.tensor([1, 0])
        plain = found.batch(indices)[0]
        assert torch.equal(plain, found.batch(indices)[0])
        drawn = [found.batch(indices, torch.Generator().manual_seed(s))[0] for s in (5, 5, 6, 7, 8)]
        assert torch.equal(drawn[0], drawn[1])
        changed = any(not torch.equal(one, plain) for one in drawn)
        assert changed == (split == "train" and bool(getattr(data, "augment", False)))


def test_engines_and_workers_can_use_it(case):
    made, options = case
    part = made(**options).load("train").subset([1, 0, 1])
    client = ClientData(pickle.loads(pickle.dumps(part)))
    assert len(client) == 3
    inputs, targets = client.batch(torch.tensor([2, 0]), torch.Generator().manual_seed(0))
    assert torch.equal(targets[0], targets[1])
    assert len(inputs) == 2


def test_a_missing_root_is_one_line_with_a_remedy(case, tmp_path):
    made, _ = case
    if made.name == "digits":
        return
    with pytest.raises(UserError) as missing:
        made(root=tmp_path / "nothing").check()
    assert str(tmp_path / "nothing") in str(missing.value)
    assert "; " in str(missing.value)
    if made.name != "fashion_mnist":  # it has a place of its own
        with pytest.raises(UserError, match=r"--data\.root"):
            made().check()


def test_every_option_is_described():
    for name in READERS:
        made = reader_class(name)
        documented = " ".join(base.__doc__ or "" for base in made.__mro__)
        for option in dataclasses.fields(made):
            assert f"{option.name}: " in documented, f"{name}: {option.name}"


@pytest.mark.parametrize("name", ["text_domains", "domainnet", "npz", "csv"])
def test_natural_clients_have_names(name, tmp_path):
    data = reader_class(name)(**options_for(name, tmp_path))
    train = data.load("train")
    assert train.groups is not None
    assert int(train.groups.max()) < len(train.group_names) >= 3
    assert train.subset([0]).group_names == train.group_names


def test_parsing_loads_no_torch():
    code = """
import sys
from dataclasses import dataclass, field
from fedcore.data import READERS
from fedcore.data.base import FedData
from fedcore.data.digits import Digits
from polymodal.cli import parse_config

@dataclass
class Config:
    data: FedData = field(default_factory=Digits, metadata={"class_typed": True})

for name in READERS:
    parsed = parse_config(Config, ["--data", name, "--data.root", "x"], choices={"data": READERS})
    assert str(parsed.data.root) == "x", name
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
