"""``fed-data`` in this process: lists, checks, partitions as files, tables and pictures."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fedcore import data_command
from fedcore.data import READERS
from fedcore.partition import Partition
from PIL import Image

_spec = importlib.util.spec_from_file_location("fed_layouts_e2e", Path(__file__).parents[1] / "_data_layouts.py")
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)


@pytest.fixture
def fed_data(monkeypatch, call_command, tmp_path):
    """Run ``fed-data`` with arguments."""
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    return partial(call_command, data_command.main, "fed-data")


def test_list_names_every_reader(fed_data):
    found = fed_data("list")
    assert found.code == 0
    for name in READERS:
        assert f"| {name} " in found.out
    assert "unpack cifar-10-python.tar.gz" in found.out


def test_check_accepts_good_files_and_tells_sizes(fed_data, tmp_path):
    root, _ = layouts.cifar10(tmp_path)
    found = fed_data("check", "--data", "cifar10", "--data.root", root)
    assert (found.code, found.err) == (0, "")
    assert "| train |      60 | 3x32x32 |      10 |             5 |                    7 |" in found.out
    assert "all files can be used (fingerprint " in found.out


def test_check_names_what_is_wrong(fed_data, tmp_path):
    root, _ = layouts.fashion(tmp_path)
    (root / "train-labels-idx1-ubyte.gz").write_bytes(b"broken")
    found = fed_data("check", "--data", "fashion_mnist", "--data.root", root)
    assert found.code == 2
    assert "train-labels-idx1-ubyte.gz cannot be read" in found.err
    assert found.err.count("\n") == 1

    path = tmp_path / "own.npz"
    x = np.arange(40.0).reshape(20, 2)
    x[3] = np.inf
    np.savez(path, x=x, y=np.arange(20) % 3, x_test=x[4:6], y_test=np.array([0, 2]))
    found = fed_data("check", "--data", "npz", "--data.root", path)
    assert found.code == 2
    assert "train: 1 inputs are not finite, the first is number 3" in found.out
    assert "note: 2 samples of test are in train too" in found.out
    assert "1 problems in npz" in found.err


def test_a_partition_is_made_shown_and_used_again(fed_data, tmp_path):
    path, picture = tmp_path / "parts" / "p.json", tmp_path / "p.png"
    options = ("--partition.clients", 12, "--partition.alpha", 0.2, "--seed", 4)
    made = fed_data("partition", "make", *options, "--out", path)
    assert (made.code, made.err) == (0, "")
    assert f"fed-train --data digits --partition.file {path}" in made.out
    content = json.loads(path.read_text())
    assert content["how"]["val_share"] == 0.1
    assert (content["size"], content["how"]["clients"], content["how"]["seed"]) == (1294, 12, 4)

    shown = fed_data("partition", "show", path, "--out", picture, "--rows", 3)
    assert (shown.code, shown.err) == (0, "")
    assert "dirichlet_client alpha 0.2 seed 4: 12 clients, 107 to 107 samples" in shown.out
    assert "9 more clients (--rows 12)" in shown.out
    partition = Partition.load(path)
    counts = json.loads(content["labels"]["counts"])
    assert [sum(row) for row in counts] == partition.sizes
    row = next(line for line in shown.out.splitlines() if line.startswith("| 2 "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert [int(cell or 0) for cell in cells[2:]] == counts[2]
    assert Image.open(picture).size[0] > 200

    same = fed_data("partition", "show", *options, "--rows", 3)
    assert same.out == shown.out.replace(f"picture: {picture}\n", "")

    unlabelled = tmp_path / "plain.json"  # as another program may write it
    partition.save(unlabelled)
    assert fed_data("partition", "show", unlabelled, "--rows", 3).out.splitlines()[0] == shown.out.splitlines()[0]


def test_fed_train_uses_the_file(tmp_path, fed_data):
    from fedcore.data.digits import Digits
    from fedcore.world import build_world
    from fedcore.world_settings import PartitionConfig

    path = tmp_path / "p.json"
    fed_data("partition", "make", "--partition.scheme", "shards", "--partition.clients", 7, "--out", path)
    config = PartitionConfig(scheme="shards", clients=7)
    known, found = (
        build_world(Digits(), chosen, val_share=0.1, seed=0) for chosen in (config, PartitionConfig(file=path))
    )
    assert all(np.array_equal(a, b) for a, b in zip(known.partition, found.partition, strict=True))


def test_many_classes_and_natural_clients_have_tables(fed_data, tmp_path):
    root, _ = layouts.cifar100(tmp_path)
    options = ("--data", "cifar100", "--data.root", root, "--partition.clients", 4, "--val_share", 0)
    found = fed_data("partition", "show", *options)
    assert found.code == 0
    assert "| client | samples | classes | most frequent" in found.out
    texts = layouts.text_domains(tmp_path / "texts")
    found = fed_data(
        "partition", "show", "--data", "text_domains", "--data.root", texts, "--partition.scheme", "column"
    )
    assert "| editorials |" in found.out
    assert "4 clients" in found.out


def test_scores_are_shown_by_bins(fed_data, tmp_path):
    root = layouts.glue(tmp_path, ["stsb"])
    options = ("--data", "glue:stsb", "--data.root", root, "--partition.scheme", "iid", "--partition.clients", 2)
    found = fed_data("partition", "show", *options, "--val_share", 0)
    assert (found.code, found.err) == (0, "")
    assert "| bin 4 |" in found.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("partition", "make"), "no file to write; give --out FILE.json"),
        (("partition", "make", "--out", "p.json", "--partition.clients", 5000), "5000 clients for 1294 samples"),
        (("partition", "make", "--out", "p.json", "--partition.scheme", "column"), "no natural clients"),
        (("partition", "show", "missing.json"), "missing.json is missing"),
        (("partition", "show", "--out", "p.txt"), "expected a name that ends in .png"),
        (("partition", "show", "--rows", "0"), "rows=0; expected at least 1"),
        (("partition", "show", "--val_share", "1"), "val_share=1"),
        (("partition", "draw"), "usage: fed-data partition make|show"),
        (("check", "--data", "cifar"), "did you mean cifar10"),
        (("check", "--data", "cifar10"), "no root folder; unpack cifar-10-python.tar.gz"),
        (("chek",), "unknown command 'chek'"),
    ],
)
def test_what_does_not_fit_is_one_line(fed_data, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    found = fed_data(*arguments)
    assert found.code == 2
    assert said in found.err
    assert found.err.count("\n") == 1
    assert not list(tmp_path.glob("p.*"))


def test_a_changed_file_is_refused(fed_data, tmp_path):
    path = tmp_path / "p.json"
    fed_data("partition", "make", "--partition.clients", 3, "--out", path)
    text = path.read_text()
    line = next(line for line in text.splitlines() if line.startswith("  ["))
    path.write_text(text.replace(line, line.replace("]", ", 7]")))
    found = fed_data("partition", "show", path)
    assert found.code == 2
    assert "do not have the checksum" in found.err


def test_help_starts_with_examples(fed_data):
    for arguments in (
        ("--help",),
        ("check", "--help"),
        ("partition", "make", "--help"),
        ("partition", "show", "--help"),
    ):
        found = fed_data(*arguments)
        assert found.code == 0
        assert "fed-data" in found.out
        assert len(found.out.splitlines()) < 60
    assert fed_data("partition", "--help").code == 0
