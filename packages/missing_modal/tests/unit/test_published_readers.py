"""Readers of MM-IMDb, Food-101 and Hateful Memes on files in their exact layouts, raw and Arrow."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from missing_modal.data import READERS, reader_class, spell_manifest
from missing_modal.data.food101 import Food101
from missing_modal.data.hatememes import HatefulMemes
from missing_modal.data.images import read_image
from missing_modal.data.mmimdb import MMIMDb
from missing_modal.tables import row_ids
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("mm_layouts_readers", Path(__file__).parents[1] / "_layouts.py")
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Raw folders by reader; not to be changed."""
    folder = tmp_path_factory.mktemp("raw")
    return {
        "mmimdb": layouts.write_mmimdb(folder / "mmimdb"),
        "food101": layouts.write_food101(folder / "food101"),
        "hatememes": layouts.write_hatememes(folder / "hatememes"),
    }


def test_names_lead_to_the_classes():
    for name in ("mmimdb", "food101", "hatememes", "manifest"):
        assert name in READERS
        assert reader_class(name).name == name
    with pytest.raises(UserError, match="did you mean food101"):
        reader_class("food")


def test_a_jsonl_file_is_a_manifest():
    assert spell_manifest(["--data", "a/b.jsonl", "--seed", "1"]) == (
        ["--data", "manifest", "--data.root", "a/b.jsonl", "--seed", "1"]
    )
    assert spell_manifest(["--data=x.jsonl"]) == ["--data", "manifest", "--data.root", "x.jsonl"]
    assert spell_manifest(["--data", "mmimdb", "--data.root", "x.jsonl"]) == (
        ["--data", "mmimdb", "--data.root", "x.jsonl"]
    )


# ------------------------------------------------------------------ MM-IMDb


def test_mmimdb_has_a_sample_a_plot_and_a_row_a_film(raw):
    data = MMIMDb(root=raw["mmimdb"])
    assert data.class_names() == layouts.GENRES
    for split, name, count in (("train", "train", 6), ("val", "dev", 3), ("test", "test", 4)):
        expected = layouts.films(name, count)
        samples = data.samples(split)
        assert row_ids(samples) == list(reversed(expected))  # the order of split.json, on which .pt tables rest
        assert [(s.table_id, s.inputs["text"]) for s in samples] == [
            (film, plot) for film in reversed(expected) for plot in expected[film][0]
        ]
        for sample in samples:
            assert list(sample.label) == layouts.multi_hot(expected[sample.table_id][1])
            assert sample.inputs["image"] == raw["mmimdb"] / "images" / f"{sample.table_id}.jpeg"


def test_mmimdb_plots_first_and_mean(raw):
    first = MMIMDb(root=raw["mmimdb"], plots="first")
    assert [s.id for s in first.samples("train")] == list(reversed(layouts.films("train", 6)))
    assert all(s.inputs["text"].startswith("Plot 0") for s in first.samples("train"))
    mean = MMIMDb(root=raw["mmimdb"], plots="mean")
    assert [s.id for s in mean.samples("test")] == [s.id for s in MMIMDb(root=raw["mmimdb"]).samples("test")]
    assert mean.average_rows
    assert not first.average_rows


def test_mmimdb_film_without_a_plot_really_lacks_the_text(tmp_path):
    home = layouts.write_mmimdb(tmp_path)
    film = json.loads((home / "split.json").read_text())["test"][0]
    layouts.put(home / "labels" / f"{film}.json", {"plot": [], "genres": ["Drama"]})
    sample = MMIMDb(root=home).samples("test")[0]
    assert (sample.id, sample.inputs["text"]) == (film, None)


def test_mmimdb_names_what_is_missing_first(tmp_path):
    with pytest.raises(UserError, match="no root folder"):
        MMIMDb().samples("train")
    with pytest.raises(UserError, match="does not exist"):
        MMIMDb(root=tmp_path / "nowhere").samples("train")
    with pytest.raises(UserError, match=r"split\.json is missing"):
        MMIMDb(root=tmp_path).samples("train")
    home = layouts.write_mmimdb(tmp_path / "d")
    film = json.loads((home / "split.json").read_text())["train"][2]
    (home / "labels" / f"{film}.json").write_text('{"plot": ["a"]}')
    with pytest.raises(UserError, match=f"{film}.json has no key 'genres'"):
        MMIMDb(root=home).samples("train")
    (home / "labels" / f"{film}.json").write_text("{")
    with pytest.raises(UserError, match="line 1: not JSON"):
        MMIMDb(root=home).samples("train")
    (home / "images" / f"{film}.jpeg").unlink()
    with pytest.raises(UserError, match=rf"images/{film}\.jpeg is missing"):
        MMIMDb(root=home).samples("train")


# ------------------------------------------------------------------ Food-101


def test_food101_classes_follow_the_index_and_files_without_a_text_go(raw):
    data = Food101(root=raw["food101"])
    assert data.class_names() == ["beef_carpaccio", "apple_pie", "baby_back_ribs"]
    train = data.samples("train")
    assert [s.id for s in train] == [file for file, _ in layouts.dishes("train", 6)][1:]  # apple_pie_0 has no text
    assert [s.label for s in train] == [{"b": 2, "a": 1}[s.id[0]] if s.id[:2] != "be" else 0 for s in train]
    assert train[0].inputs["text"] == 'How to make baby back ribs, "easy" no. 1'
    val, test = data.samples("val")[0], data.samples("test")[0]
    assert val.inputs["image"] == raw["food101"] / "images" / "train" / "apple_pie" / val.id  # val lies in train
    assert test.inputs["image"] == raw["food101"] / "images" / "test" / "apple_pie" / test.id


@pytest.mark.parametrize("header", [True, False])
def test_food101_titles_give_the_same_texts(raw, tmp_path, header):
    home = layouts.write_food101(tmp_path, texts="csv", header=header)
    titles, texts = Food101(root=home), Food101(root=raw["food101"])
    for split in ("train", "val", "test"):
        assert [(s.id, s.inputs["text"]) for s in titles.samples(split)] == [
            (s.id, s.inputs["text"]) for s in texts.samples(split)
        ]
    assert titles.fingerprint() == texts.fingerprint()


def test_food101_names_what_is_wrong(tmp_path):
    home = layouts.write_food101(tmp_path / "d")
    layouts.put(home / "class_idx.json", {"apple_pie": 1, "baby_back_ribs": 2, "beef_carpaccio": 2})
    with pytest.raises(UserError, match="must number 3 classes from 0"):
        Food101(root=home).samples("train")
    layouts.put(home / "class_idx.json", {"apple_pie": 0, "baby_back_ribs": 1})
    with pytest.raises(UserError, match="class 'beef_carpaccio'"):
        Food101(root=home).samples("train")
    (home / "class_idx.json").unlink()
    with pytest.raises(UserError, match=r"class_idx\.json is missing"):
        Food101(root=home).class_names()
    home = layouts.write_food101(tmp_path / "e", texts="csv")
    (home / "texts" / "test_titles.csv").unlink()
    with pytest.raises(UserError, match=r"neither .*text\.json nor .*test_titles\.csv"):
        Food101(root=home).samples("train")


# ------------------------------------------------------------------ Hateful Memes


@pytest.mark.parametrize(("inside", "test_name"), [("", "test_seen"), ("data", "test_seen"), ("data", "test")])
def test_hatememes_layouts(tmp_path, inside, test_name):
    data = HatefulMemes(root=layouts.write_hatememes(tmp_path, inside=inside, test_name=test_name))
    assert data.class_names()[1] == "hateful"
    for split, name, count in (("train", "train", 6), ("val", "dev", 4), ("test", "test", 4)):
        expected = layouts.memes(name, count)
        samples = data.samples(split)
        assert [s.id for s in samples] == [f"{row['id']:05d}" for row in expected]
        assert [(s.label, s.inputs["text"]) for s in samples] == [(row["label"], row["text"]) for row in expected]
        assert all(s.inputs["image"].is_file() for s in samples)
    unseen = HatefulMemes(root=tmp_path, tested="unseen").samples("test")
    assert [s.id for s in unseen] == ["30000", "30001", "30002"]


def test_hatememes_refuses_the_competition_list_and_takes_test_seen_where_both_lie(tmp_path):
    home = layouts.write_hatememes(tmp_path)
    rows = [{key: row[key] for key in ("id", "img", "text")} for row in layouts.memes("test", 4)]
    layouts.put(home / "test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [s.label for s in HatefulMemes(root=home).samples("test")] == [0, 1, 0, 1]
    (home / "test_seen.jsonl").unlink()
    with pytest.raises(UserError, match=r"test\.jsonl:1: label None; .*use test_seen\.jsonl"):
        HatefulMemes(root=home).samples("test")


def test_hatememes_names_what_is_missing(tmp_path):
    home = layouts.write_hatememes(tmp_path)
    (home / "img" / "01237.png").unlink()
    with pytest.raises(UserError, match=r"img/01237\.png is missing"):
        HatefulMemes(root=home).samples("train")
    (home / "dev.jsonl").rename(home / "dev_seen.jsonl")
    assert len(HatefulMemes(root=home).samples("val")) == 4
    (home / "dev_seen.jsonl").unlink()
    with pytest.raises(UserError, match=r"dev\.jsonl is missing"):
        HatefulMemes(root=home).samples("val")


# ------------------------------------------------------------------ what they share

READER = {"mmimdb": MMIMDb, "food101": Food101, "hatememes": HatefulMemes}


@pytest.mark.parametrize("name", READER)
def test_fingerprint_and_description(raw, name):
    data, again = READER[name](root=raw[name]), READER[name](root=str(raw[name]))
    data.check()
    assert data.fingerprint() == again.fingerprint()
    said = data.describe()
    json.dumps(said)  # it goes into the manifest of a run
    assert said["splits"]["train"]["patterns"] == {"complete": len(data.samples("train"))}
    assert said["splits"]["test"]["rows"] == data.rows_of("test") == 4
    assert sum(data.counts.values()) == {"mmimdb": 25959, "food101": 90704, "hatememes": 10000}[name]


def test_fingerprint_sees_texts_and_labels(tmp_path):
    home = layouts.write_mmimdb(tmp_path)
    before = MMIMDb(root=home).fingerprint()
    film = json.loads((home / "split.json").read_text())["test"][0]
    path = home / "labels" / f"{film}.json"
    content = json.loads(path.read_text())
    layouts.put(path, content | {"plot": ["another"] * len(content["plot"])})
    changed = MMIMDb(root=home).fingerprint()
    layouts.put(path, content | {"genres": ["Film-Noir"]})
    assert len({before, changed, MMIMDb(root=home).fingerprint()}) == 3


def test_a_row_belongs_to_one_split(tmp_path):
    home = layouts.write_mmimdb(tmp_path)
    split = json.loads((home / "split.json").read_text())
    layouts.put(home / "split.json", split | {"dev": split["dev"] + split["train"][:1]})
    with pytest.raises(UserError, match="is in train and in val"):
        MMIMDb(root=home).check()
    layouts.put(home / "split.json", split | {"dev": split["dev"] + split["dev"][:1]})
    with pytest.raises(UserError, match="occurs twice"):
        MMIMDb(root=home).check()


# ------------------------------------------------------------------ Arrow


@pytest.mark.parametrize("name", READER)
def test_official_arrow_files_give_the_same_samples(raw, tmp_path, name):
    pytest.importorskip("pyarrow")
    home = getattr(layouts, f"{name}_arrow")(tmp_path)
    data, files = READER[name](root=home), READER[name](root=raw[name])
    assert data.is_arrow
    if name == "food101":  # the official writer drops apple_pie_0 as well; the fixture keeps it
        assert data.class_names() == files.class_names()  # told by file names and labels
    for split in ("train", "val", "test"):
        held = [s for s in data.samples(split) if s.id != "apple_pie_0.jpg"]
        assert [s.label for s in held] == [s.label for s in files.samples(split)]
        if name == "mmimdb":
            assert [(s.id, s.row, s.inputs["text"]) for s in held] == [
                (s.id, s.row, s.inputs["text"]) for s in files.samples(split)
            ]
        assert read_image(held[-1].inputs["image"]).mode == "RGB"
    if name == "hatememes":
        assert [s.id for s in data.samples("val")] == ["dev-00000", "dev-00001", "dev-00002", "dev-00003"]
        with pytest.raises(UserError, match="needs the raw folder"):
            HatefulMemes(root=home, tested="unseen").samples("test")


@pytest.mark.parametrize("name", READER)
def test_converted_files_are_the_raw_folder(raw, tmp_path, name, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    from missing_modal.data import arrow

    monkeypatch.setattr(arrow, "BATCH_ROWS", 4)
    files = READER[name](root=raw[name])
    for split in ("train", "val", "test"):
        count = arrow.write_table(files.arrow_file(split, tmp_path), files.arrow_rows(split), files.label_type)
        assert count == files.rows_of(split)
    data = READER[name](root=tmp_path)
    if name == "food101":
        (tmp_path / "class_idx.json").write_bytes((raw[name] / "class_idx.json").read_bytes())
    assert data.fingerprint() == files.fingerprint()
    for ours, theirs in zip(data.samples("train"), files.samples("train"), strict=True):
        image, other = ours.inputs["image"], theirs.inputs["image"]
        assert image.read() == other.read_bytes()
        np.testing.assert_array_equal(np.asarray(read_image(image)), np.asarray(read_image(other)))
    # the columns that the official code asks for, read as it does
    table = pa.ipc.RecordBatchFileReader(pa.memory_map(str(data.arrow_file("train")))).read_all()
    text = {"mmimdb": "plots"}.get(name, "text")
    assert {"image", text, "label", "split"} <= set(table.column_names)
    assert isinstance(table[text][0].as_py(), list)
    assert isinstance(table["label"][0].as_py(), list if name == "mmimdb" else int)


def test_wrong_arrow_files(raw, tmp_path):
    pytest.importorskip("pyarrow")
    home = layouts.mmimdb_arrow(tmp_path)
    (home / "mmimdb_dev.arrow").unlink()
    with pytest.raises(UserError, match=r"mmimdb_dev\.arrow is missing"):
        MMIMDb(root=home).samples("val")
    layouts.put(home / "mmimdb_dev.arrow", b"no arrow at all")
    with pytest.raises(UserError, match="cannot be read as an Arrow IPC file"):
        MMIMDb(root=home).samples("val")
    layouts.write_arrow(home / "mmimdb_dev.arrow", {"image": [b"x"], "text": [["a"]]})
    with pytest.raises(UserError, match="no column 'plots'"):
        MMIMDb(root=home).samples("val")
    layouts.write_arrow(
        home / "mmimdb_dev.arrow", {"image": [b"x"], "plots": [["a"]], "label": [[1, 0]], "image_id": ["7"]}
    )
    with pytest.raises(UserError, match="label of 2 values; expected 23"):
        MMIMDb(root=home).samples("val")


def test_the_extra_is_named_where_pyarrow_is_not_there(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    layouts.put(tmp_path / "mmimdb_train.arrow", b"")
    with pytest.raises(UserError, match=r"polymodal-missing-modal\[arrow\]"):
        MMIMDb(root=tmp_path).samples("train")
