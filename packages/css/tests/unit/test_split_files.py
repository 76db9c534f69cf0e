"""Splits as text files with checksums."""

import importlib.util
from pathlib import Path

import pytest
from css.data.pairs import Pairs
from css.data.scenarios import SETTINGS
from css.data.split_files import read_split, split_path, step_indices, write_split, write_splits
from css.task import Task
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("css_layouts_splits", Path(__file__).parents[1] / "_layouts.py")
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)
TASK = Task("2-1", 4)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return layouts.write_pairs(tmp_path_factory.mktemp("pairs"), train=16, test=6, val=2)


@pytest.fixture
def written(root, tmp_path):
    write_splits(tmp_path / "splits", Pairs(root=root), TASK, "overlap", seed=3)
    return tmp_path / "splits"


def with_files(root, folder):
    return Pairs(root=root, split_files=folder)


@pytest.mark.parametrize("setting", SETTINGS)
def test_files_give_back_what_was_selected(root, tmp_path, setting):
    plain = Pairs(root=root)
    files = write_splits(tmp_path / "new" / "splits", plain, TASK, setting, seed=5)
    names = [f"{split}-step{step}.txt" for step in range(3) for split in ("train", "test")]
    assert [path.name for path in files] == names
    reader = with_files(root, tmp_path / "new" / "splits")
    for split in ("train", "val", "test"):
        for step in range(3):
            selected = step_indices(plain, TASK, setting, step, split, seed=5)
            assert selected or split == "val"
            assert step_indices(reader, TASK, setting, step, split, seed=5) == selected


def test_the_file_is_followed_not_the_rule(root, written):
    path = split_path(written, "train", 1)
    header = {key: value for key, value in read_split(path).header.items() if key != "sha256"}
    write_split(path, ["train7", "train2"], header)
    assert step_indices(with_files(root, written), TASK, "overlap", 1, "train") == [7, 2]


def test_the_partition_of_the_files_holds_whatever_the_seed(root, tmp_path):
    write_splits(tmp_path, Pairs(root=root), TASK, "partitioned", seed=5)
    first = [step_indices(Pairs(root=root), TASK, "partitioned", step, "train", seed=5) for step in range(3)]
    other = [step_indices(Pairs(root=root), TASK, "partitioned", step, "train", seed=6) for step in range(3)]
    read = [step_indices(with_files(root, tmp_path), TASK, "partitioned", step, "train", seed=6) for step in range(3)]
    assert first == read != other


def test_headers_tell_what_the_file_is(written):
    found = read_split(written / "train-step2.txt")
    assert found.header == {
        "data": "pairs",
        "split": "train",
        "step": "2",
        "task": "2-1",
        "setting": "overlap",
        "order": "1,2 | 3 | 4",
        "classes": "4",
        "seed": "3",
        "pictures": str(len(found.ids)),
        "sha256": found.sha256,
    }
    lines = (written / "train-step2.txt").read_text().splitlines()
    assert lines[0].startswith("# pictures of one step")
    assert [line for line in lines if not line.startswith("# ")] == list(found.ids)


@pytest.mark.parametrize("change", ["gone", "more", "swapped", "twice", "renamed"])
def test_a_changed_file_is_named(root, written, change):
    path = split_path(written, "train", 1)
    lines = path.read_text().splitlines()
    if change == "gone":
        del lines[-1]
    elif change == "more":
        lines.append("train0")
    elif change == "swapped":
        lines[-1], lines[-2] = lines[-2], lines[-1]
    elif change == "twice":
        lines.append(lines[-1])
    else:
        lines[-1] = "train99"
    path.write_text("\n".join(lines) + "\n")
    reader = with_files(root, written)
    with pytest.raises(UserError, match=r"split file .*train-step1\.txt"):
        step_indices(reader, TASK, "overlap", 1, "train")
    for step, split in ((0, "train"), (1, "test"), (2, "train")):  # the others are as they were
        assert step_indices(reader, TASK, "overlap", step, split)


def test_line_ends_of_another_system_change_nothing(root, written):
    path = split_path(written, "test", 0)
    before = read_split(path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_split(path) == before


def test_ids_that_look_like_comments_are_ids(tmp_path):
    ids = ["#1", "# sha256: none", "a b", "ü"]
    write_split(tmp_path / "s.txt", ids, {"task": "2-1"})
    assert read_split(tmp_path / "s.txt").ids == tuple(ids)
    with pytest.raises(ValueError, match="line break"):
        write_split(tmp_path / "s.txt", ["a\nb"], {})


@pytest.mark.parametrize(
    ("task", "setting", "says"),
    [
        (TASK, "disjoint", "was written for setting overlap, this run has disjoint"),
        (Task("2-1", 4, (4, 3, 2, 1)), "overlap", "was written for task 2-1 with other classes, this run has 2-1"),
        (Task("1-1", 4), "overlap", "was written for task 2-1 with other classes, this run has 1-1"),
    ],
)
def test_files_of_another_run_are_refused(root, written, task, setting, says):
    with pytest.raises(UserError, match=rf"train-step0\.txt {says}"):
        step_indices(with_files(root, written), task, setting, 0, "train")


def test_a_file_under_another_name_is_refused(root, written):
    split_path(written, "test", 0).replace(split_path(written, "train", 0))
    with pytest.raises(UserError, match=r"train-step0\.txt was written for split test, this run has train"):
        step_indices(with_files(root, written), TASK, "overlap", 0, "train")


def test_the_order_within_a_step_does_not_matter(root, written):
    task = Task("2-1", 4, (2, 1, 3, 4))
    chosen = step_indices(Pairs(root=root), TASK, "overlap", 0, "train")
    assert step_indices(with_files(root, written), task, "overlap", 0, "train") == chosen


def test_pictures_that_are_not_there_are_named(root, written, tmp_path):
    smaller = layouts.write_pairs(tmp_path / "smaller", train=14, test=6)
    with pytest.raises(UserError, match=r"train-step1\.txt: picture train14 is not in the train split of pairs"):
        step_indices(with_files(smaller, written), TASK, "overlap", 1, "train")


def test_missing_files_and_files_without_checksum_are_named(root, tmp_path):
    reader = with_files(root, tmp_path)
    with pytest.raises(UserError, match=r"train-step0\.txt is missing"):
        step_indices(reader, TASK, "overlap", 0, "train")
    for text in ("", "train0\ntrain1\n", "# only a comment\n"):
        (tmp_path / "train-step0.txt").write_text(text)
        with pytest.raises(UserError, match=r"train-step0\.txt has no line '# sha256"):
            step_indices(reader, TASK, "overlap", 0, "train")
    write_split(
        tmp_path / "train-step0.txt", [], {"split": "train", "step": "0", "setting": "overlap", "order": "1,2 | 3 | 4"}
    )
    with pytest.raises(UserError, match=r"train-step0\.txt has no ids"):
        step_indices(reader, TASK, "overlap", 0, "train")


def test_nothing_is_written_where_a_step_is_empty(tmp_path):
    root = layouts.write_pairs(tmp_path / "few", train=2, test=2)
    with pytest.raises(UserError, match=r"step 2, setting overlap: no training picture for the classes 4 \(star\)"):
        write_splits(tmp_path / "splits", Pairs(root=root), TASK, "overlap")
    assert not (tmp_path / "splits").exists()
