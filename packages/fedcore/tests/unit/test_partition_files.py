"""Partition files: what is written is read, and what was changed or belongs elsewhere is refused."""

import json

import numpy as np
import pytest
from fedcore.partition import Partition, by_column, dirichlet_client
from fedcore.partition_files import Labels, checksum, load, read_labels, save
from polymodal.errors import UserError

LABELS = np.arange(60) % 4


@pytest.fixture
def stored(tmp_path):
    partition, path = dirichlet_client(LABELS, 5, 0.3, 1), tmp_path / "new" / "p.json"
    labels = Labels(partition.counts(LABELS), ("a", "b", "c", "d"), "mine")
    save(partition, path, data="mine", fingerprint="0123", labels=labels)
    return partition, path


def test_what_is_written_is_read(stored):
    partition, path = stored
    for found in (load(path), load(path, size=60, fingerprint="0123"), Partition.load(path, size=60)):
        assert all(np.array_equal(a, b) for a, b in zip(partition, found, strict=True))
        assert (found.how, found.size) == (partition.how, 60)
    labels = read_labels(path)
    assert labels.counts.tolist() == partition.counts(LABELS).tolist()
    assert (labels.class_names, labels.data) == (("a", "b", "c", "d"), "mine")
    named = by_column(LABELS, ["w", "x", "y", "z"])
    named.save(path)
    assert Partition.load(path).names == ("w", "x", "y", "z")
    assert read_labels(path) is None


def test_one_line_a_client(stored):
    partition, path = stored
    lines = path.read_text().splitlines()
    assert sum(line.startswith("  [") for line in lines) == len(partition)


def edited(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del content[key]
        else:
            content[key] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clients": [[1], [2]]}, "its indices do not have the checksum"),
        ({"clients": [[1], [60]]}, r"index outside 0\.\.59"),
        ({"clients": [["a"]]}, "cannot be read"),
        ({"clients": [[[1]]]}, "clients are not lists of indices"),
        ({"clients": None}, "no entry 'clients'"),
        ({"sha256": None}, "no entry 'sha256'"),
        ({"schema": "else"}, 'no "schema": "fedcore.partition"'),
        ({"schema_version": 2}, "schema version 2, known is 1; update"),
        ({"schema_version": None}, "cannot be read"),
        ({"size": 61}, "do not have the checksum"),
    ],
)
def test_changed_files_are_refused(stored, changes, said):
    _, path = stored
    edited(path, **changes)
    with pytest.raises(UserError, match=said):
        load(path)


def test_files_for_other_data_are_refused(stored):
    _, path = stored
    with pytest.raises(UserError, match="was made for mine with 60 training samples, this run has 50"):
        load(path, size=50)
    with pytest.raises(UserError, match="fingerprint 0123, this data has 4567"):
        load(path, size=60, fingerprint="4567")


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"p\.json is missing; write it again with fed-data partition make"):
        load(tmp_path / "p.json")
    (tmp_path / "p.json").write_text('{"schema": ')
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "p.json")
    (tmp_path / "p.json").write_text("[]")
    with pytest.raises(UserError, match='no "schema"'):
        load(tmp_path / "p.json")


def test_labels_that_do_not_fit_are_left_out(stored):
    _, path = stored
    edited(path, labels={"classes": ["a"], "counts": "[[1]]"})
    assert read_labels(path) is None
    edited(path, labels=3)
    assert read_labels(path) is None


def test_the_checksum_is_of_who_has_what():
    one = Partition((np.array([0, 1]), np.array([2])), 3, {"scheme": "a"})
    assert checksum(one) == checksum(Partition(one.clients, 3, {"scheme": "b"}))
    assert checksum(one) != checksum(Partition((np.array([0]), np.array([1, 2])), 3))
    assert checksum(one) != checksum(Partition(one.clients, 4))
