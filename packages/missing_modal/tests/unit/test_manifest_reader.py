"""A user's own rows: real nulls, headers, splits, labels, and what is said about bad rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from missing_modal.data.manifest import Manifest
from missing_modal.tables import natural_mask
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("mm_layouts_manifest", Path(__file__).parents[1] / "_layouts.py")
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def text_row(name, label="a", **more):
    return {"id": name, "text": f"words of {name}", "label": label, **more}


def header(**said):
    return {"schema": "missing_modal.manifest", "schema_version": 1, **said}


def test_nulls_and_absent_keys_are_really_missing(tmp_path):
    data = Manifest(root=layouts.write_manifest(tmp_path))
    data.check()
    assert data.modalities == ("image", "text", "audio", "tabular")
    assert data.class_names() == ["cat", "dog"]
    assert (data.task, data.metric) == ("multiclass", "accuracy")
    found = {s.id: s for split in ("train", "val", "test") for s in data.samples(split)}
    assert sorted(found, key=lambda name: int(name[1:])) == [f"s{i}" for i in range(12)]
    for i, (name, lacks) in enumerate({"s0": 0, "s1": 1, "s2": 2, "s3": 4, "s4": 0, "s5": 9}.items()):
        assert natural_mask(found[name].inputs, data.modalities) == 15 - lacks, name
        assert found[name].label == (0 if i % 2 else 1)
    assert found["s0"].inputs["image"] == tmp_path / "pictures" / "0.png"
    assert found["s4"].inputs["tabular"] == [4, 2.0, -1.5]
    assert [s.id for s in data.samples("val")] == ["s4", "s5"]
    assert data.describe()["splits"]["train"]["patterns"]["complete"] == 2


def test_folder_of_three_files_and_none_for_validation(tmp_path):
    write(tmp_path / "train.jsonl", text_row("a", 3), text_row("b", 20))
    write(tmp_path / "test.jsonl", text_row("c", 7, row="film"), text_row("d", 7, row="film"))
    data = Manifest(root=tmp_path)
    assert data.class_names() == ["3", "7", "20"]  # numbers by value
    assert [s.label for s in data.samples("train")] == [0, 2]
    assert data.samples("val") == []
    assert {s.table_id for s in data.samples("test")} == {"film"}
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"test\.jsonl is missing"):
        Manifest(root=tmp_path).samples("train")


def test_rows_without_a_split_are_dealt_out_by_their_ids(tmp_path):
    rows = [text_row(f"r{i}", "ab"[i % 2]) for i in range(200)]
    split = {}
    for name, order in (("x", rows), ("y", rows[::-1]), ("z", rows[:150])):
        data = Manifest(root=write(tmp_path / f"{name}.jsonl", *order))
        split[name] = {s.id: part for part in ("train", "val", "test") for s in data.samples(part)}
    assert split["x"] == split["y"]
    assert split["z"].items() <= split["x"].items()
    shares = {part: list(split["x"].values()).count(part) / 200 for part in ("train", "val", "test")}
    assert abs(shares["test"] - 0.2) < 0.08
    assert abs(shares["val"] - 0.1) < 0.06
    with pytest.raises(UserError, match="together below 1"):
        Manifest(root=tmp_path / "x.jsonl", val_share=0.5, test_share=0.5)
    half = [row | ({"split": "train"} if i % 2 else {}) for i, row in enumerate(rows)]
    with pytest.raises(UserError, match="in each row, or in no row"):
        Manifest(root=write(tmp_path / "h.jsonl", *half)).samples("train")


def test_header_names_modalities_classes_and_labels(tmp_path):
    layouts.put(tmp_path / "f.png", layouts.encoded(0, "PNG"))
    rows = [
        {"id": i, "front": "f.png", "side": None, "size": [1, 2], "label": ["x"][: i % 2], "split": "train"}
        for i in range(3)
    ]
    said = header(
        modalities={"size": "tabular", "front": "image", "side": "image"}, classes=["y", "x"], labels="multilabel"
    )
    data = Manifest(root=write(tmp_path / "d.jsonl", said, *rows))
    assert data.modalities == ("size", "front", "side")
    assert data.kinds == {"size": "tabular", "front": "image", "side": "image"}
    assert data.metric == "f1_macro"
    assert [s.label for s in data.samples("train")] == [(0, 0), (0, 1), (0, 0)]
    assert natural_mask(data.samples("train")[0].inputs, data.modalities) == 0b011


def test_labels_tell_the_task_unless_it_is_stated(tmp_path):
    path = write(tmp_path / "a.jsonl", *(text_row(str(i), i % 2, split="train") for i in range(4)))
    assert Manifest(root=path).task == "multiclass"
    assert Manifest(root=path, labels="binary").metric == "auroc"
    several = write(tmp_path / "b.jsonl", *(text_row(str(i), ["b", "a"][: i % 3], split="train") for i in range(4)))
    data = Manifest(root=several)
    assert (data.task, data.class_names()) == ("multilabel", ["a", "b"])
    assert [s.label for s in data.samples("train")] == [(0, 0), (0, 1), (1, 1), (0, 0)]
    three = write(tmp_path / "c.jsonl", *(text_row(str(i), i, split="train") for i in range(3)))
    with pytest.raises(UserError, match="3 classes .*expected exactly 2"):
        Manifest(root=three, labels="binary").class_names()


def test_the_kind_of_the_labels_is_looked_up_once_not_for_each_row(tmp_path):
    """A look at all rows for each row made 20,000 rows take minutes."""

    class Row(dict):
        looked = 0

        def get(self, key, default=None):
            Row.looked += key == "label"
            return super().get(key, default)

    data = Manifest(root=write(tmp_path / "m.jsonl", *(text_row(f"r{place}", "ab"[place % 2]) for place in range(50))))
    header_, splits = data._read()
    data.__dict__["_rows"] = (header_, {s: [(w, Row(row)) for w, row in rows] for s, rows in splits.items()})
    assert sum(len(data.samples(split)) for split in ("train", "val", "test")) == 50
    assert Row.looked <= 4 * 50


def test_rows_to_predict_need_no_label(tmp_path):
    rows = [text_row("a", "x", split="train"), text_row("b", "y", split="train"), text_row("c", None, split="test")]
    data = Manifest(root=write(tmp_path / "d.jsonl", *rows))
    assert data.samples("test")[0].label is None
    rows[0]["label"] = None
    with pytest.raises(UserError, match=r"d\.jsonl:1: no label"):
        Manifest(root=write(tmp_path / "d.jsonl", *rows, text_row("e", "z", split="test"))).samples("train")


GOOD = [text_row("a", "x", split="train"), text_row("b", "y", split="test")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r":3: not JSON"),
        ("[1]", r":3: expected an object, got list"),
        ({"id": "c", "txt": "q", "label": "x"}, r":3: unknown key 'txt'; did you mean text"),
        ({"text": "q", "label": "x"}, r":3: id None; expected"),
        ({"id": "a", "text": "q", "label": "x", "split": "train"}, r":3: id 'a' is also that of line 1"),
        ({"id": "c", "text": 5, "label": "x", "split": "train"}, r":3: text: expected a text or null, found 5"),
        ({"id": "c", "image": "no.png", "label": "x", "split": "train"}, r":3: image: .*no\.png is missing"),
        ({"id": "c", "image": "", "label": "x", "split": "train"}, r":3: image is empty; write null"),
        ({"id": "c", "tabular": [1, None], "label": "x", "split": "train"}, r":3: tabular: expected a list of numbers"),
        ({"id": "c", "text": None, "label": "x", "split": "train"}, r"c has no modality at all; remove it"),
        ({"id": "c", "text": "q", "label": "x", "split": "dev"}, r":3: split 'dev'; expected one of train, val, test"),
        ({"id": "c", "text": "q", "label": ["x"], "split": "train"}, r":1: label 'x'; expected a list of classes"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        Manifest(root=write(tmp_path / "d.jsonl", *GOOD, row)).samples("train")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"schema": "other", "schema_version": 1}, "expected schema 'missing_modal.manifest'"),
        (header() | {"schema_version": 9}, "schema_version 9 is newer than 1; update"),
        (header(modalities={"front": "video"}), "one of image, text, audio, tabular each"),
        (header(classes=["a", "a"]), "a list of distinct names"),
        (header(labels="ranking"), "expected one of multiclass, multilabel, binary"),
        (header(order=1), "unknown key 'order' in the header"),
        (header(classes=["x", "z"]), r":3: unknown class 'y'; known: x, z"),
    ],
)
def test_bad_headers(tmp_path, said, message):
    data = Manifest(root=write(tmp_path / "d.jsonl", said, *GOOD))
    with pytest.raises(UserError, match=message):
        data.check()


def test_no_file_and_no_rows(tmp_path):
    with pytest.raises(UserError, match=r"no file given; .*--data.root FILE"):
        Manifest().samples("train")
    with pytest.raises(UserError, match=r"gone\.jsonl is missing"):
        Manifest(root=tmp_path / "gone.jsonl").samples("train")
    with pytest.raises(UserError, match="no rows; write one object a line"):
        Manifest(root=write(tmp_path / "e.jsonl")).samples("train")
