"""Readers of texts: hashed words, GLUE in both layouts, sentiment by domain, metrics."""

import csv
import importlib.util
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fedcore.data import reader_class
from fedcore.data.glue import Glue
from fedcore.data.glue_tasks import TASKS
from fedcore.data.metrics import METRICS, f1, matthews, pearson, spearman
from fedcore.data.text_domains import TextDomains
from fedcore.data.text_ids import hash_ids, words
from fedcore.partition import by_column
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("fed_layouts_text", Path(__file__).parents[1] / "_data_layouts.py")
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)

REAL_TEXTS = Path(os.environ.get("VADER_TEXTS", "/nowhere"))
"""vaderSentiment's folder with the four files, where it is named"""


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))


# ------------------------------------------------------------------ hashing


def test_words_keep_moods():
    assert words("It's GREAT :-) really!!") == ["it's", "great", ":-)", "really", "!!"]


def test_ids_are_those_of_all_short_runs():
    one = hash_ids(["a b c"], 1, 1000, 64)
    two = hash_ids(["a b c"], 2, 1000, 64)
    assert (len(one), len(two)) == (3, 5)
    assert two[:3] == one
    assert hash_ids(["b"], 1, 1000, 64) == one[1:2]  # the same word has the same id everywhere
    assert hash_ids(["", "b"], 1, 1000, 64) != one[1:2]  # except as a second text
    assert one == [zlib.crc32(b"0\x1f" + word) % 1000 + 1 for word in (b"a", b"b", b"c")]  # and on every machine


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(max_size=60), min_size=1, max_size=2), st.integers(1, 3), st.integers(1, 50), st.integers(2, 20)
)
def test_ids_stay_in_range_and_length(texts, ngrams, buckets, length):
    ids, total = hash_ids(texts, ngrams, buckets, length), sum(len(words(text)) for text in texts)
    assert all(1 <= number <= buckets for number in ids)
    assert len(ids) <= length * ngrams
    assert len(hash_ids(texts, 1, buckets, length)) == min(length, total)  # no room is left unused


def test_a_long_text_leaves_room_for_the_other():
    long, short = "w " * 50, "a b"
    assert len(hash_ids([long, short], 1, 99, 10)) == 10
    assert hash_ids([long, short], 1, 99, 10)[-2:] == hash_ids(["", short], 1, 99, 10)


# ------------------------------------------------------------------ GLUE


@pytest.mark.parametrize("task", list(TASKS))
def test_glue_reads_the_official_files(tmp_path, task):
    root = layouts.glue(tmp_path, [task])
    _, _, lines = layouts.GLUE_TSV[task]
    data = reader_class(f"glue:{task}")(root=root)
    data.check()
    expected = {
        "sst2": [0, 1, 0, 1],
        "cola": [1, 0, 1],
        "mrpc": [1, 0],
        "qqp": [0, 1],
        "qnli": [0, 1],
        "rte": [1, 0],
        "wnli": [1, 0],
        "mnli": [1, 0, 2],
        "stsb": [5.0, 0.5, 2.6],
    }[task]
    assert data.load("train").targets.tolist() == pytest.approx(expected)
    assert len(lines) - len(expected) == {"qqp": 1, "mnli": 1}.get(task, 0)  # a broken line, a pair without label
    assert data.num_classes == {"stsb": 1, "mnli": 3}.get(task, 2)
    assert data.splits == (("train", "test", "test_mismatched") if task == "mnli" else ("train", "test"))
    assert data.describe()["name"] == f"glue:{task}"
    assert set(data.metrics) <= set(METRICS)
    texts = "it's a test" if task == "cola" else None
    assert texts is None or data.load("train").inputs.shape[0] == 3


def test_glue_gives_both_texts_of_a_pair_and_the_right_columns(tmp_path):
    data = Glue(root=layouts.glue(tmp_path), task="qnli", ngrams=1)
    ids = data.load("train").inputs[0]
    assert ids[ids != 0].tolist() == hash_ids(["When did it start?", "In 1909."], 1, 16384, 128)
    data = Glue(root=tmp_path, task="sst2", ngrams=1)
    ids = data.load("train").inputs[1]
    assert ids[ids != 0].tolist() == hash_ids(['a "fine film'], 1, 16384, 64)  # a lone quote is a character


def test_glue_partitions_scores_by_five_classes(tmp_path):
    data = Glue(root=layouts.glue(tmp_path, ["stsb"]), task="stsb")
    assert data.regression
    assert data.load("train").targets.dtype == torch.float32
    assert data.partition_labels().tolist() == [4, 0, 2]


def test_glue_reads_the_other_layout(tmp_path):
    folder = tmp_path / "mrpc"
    folder.mkdir()
    for split in ("train", "validation"):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as handle:
            rows = [["text1", "text2", "label"], ['He said, "no"\nand left', "He left", 1], ["A", "B", 0]]
            csv.writer(handle).writerows(rows)
    data = Glue(root=tmp_path, task="mrpc", ngrams=1)
    assert data.load("test").targets.tolist() == [1, 0]
    ids = data.load("train").inputs[0]
    assert ids[ids != 0].tolist() == hash_ids(['He said, "no" and left', "He left"], 1, 16384, 128)

    rows = [{"Sentence": "Fine.", "Acceptability": 1}, {"Sentence": "Fine not.", "Acceptability": 0}]
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "train.json").write_text(json.dumps(rows))
    (tmp_path / "cola" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cola = Glue(root=tmp_path / "cola", task="cola")
    assert cola.load("train").targets.tolist() == cola.load("test").targets.tolist() == [1, 0]


def test_glue_says_what_is_missing_or_broken(tmp_path):
    with pytest.raises(UserError, match="glue: no root folder; give the folder that holds the tasks"):
        Glue().check()
    root = layouts.glue(tmp_path, ["sst2"])
    with pytest.raises(UserError, match=r"glue:rte: .*train\.tsv is missing"):
        Glue(root=root, task="rte").check()
    path = root / "SST-2" / "dev.tsv"
    for content, said in (
        ("sentence\tlabel\ngood\t2\n", r"row 1: label '2'; expected 0\.\.1 or negative, positive"),
        ("sentence\tlabel\ngood\tfine\n", "label 'fine'"),
        ("text9\tlabel\ngood\t1\n", r"no column for the text \(sentence or text or text1\) but text9, label"),
        ("sentence\tlabel\n", "has no rows"),
        ("", "has no rows"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            Glue(root=root).load("test")
    path.write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(UserError, match="line 2: byte 0xe9 is not utf-8"):
        Glue(root=root).load("test")
    with pytest.raises(UserError, match="glue task 'sst'"):
        Glue(task="sst")
    with pytest.raises(UserError, match="split 'val'; expected one of train, test"):
        Glue(root=root).load("val")


# ------------------------------------------------------------------ text domains


@pytest.mark.parametrize("archive", [False, True])
def test_text_domains_are_four_natural_clients(tmp_path, archive):
    root = layouts.text_domains(tmp_path / "vader", archive=archive)
    data = TextDomains(root=root)
    train, test = data.load("train"), data.load("test")
    assert train.group_names == ("tweets", "films", "products", "editorials")
    partition = by_column(train.groups.numpy(), train.group_names)
    assert partition.names == train.group_names
    assert 0 not in partition.sizes
    lines = sum(len((root / f).read_text().splitlines()) for f in layouts.DOMAIN_FILES.values()) if not archive else 100
    kept = len(train) + len(test)
    assert 0 < lines - kept < lines / 4  # scores of 0 are left out
    good = hash_ids(["good"], 1, 16384, 64)[0]
    for found in (train, test):
        assert torch.equal((found.inputs == good).any(dim=1).long(), found.targets)


def test_sentences_of_a_document_are_in_one_split(tmp_path):
    data = TextDomains(root=layouts.text_domains(tmp_path), ngrams=1)
    seen = {}
    for split in ("train", "test"):
        for document in range(1, 11):
            token = hash_ids([f"{document}"], 1, 16384, 64)[0]
            found = data.load(split)
            films = found.groups == 1
            if (found.inputs[films] == token).any():
                seen.setdefault(document, set()).add(split)
    # words 1..3 are also numbers of sentences
    assert all(len(splits) == 1 for document, splits in seen.items() if document > 3)
    assert {split for splits in seen.values() for split in splits} == {"train", "test"}


def test_text_domains_say_what_is_missing_or_broken(tmp_path):
    root = layouts.text_domains(tmp_path / "v")
    path = root / layouts.DOMAIN_FILES["films"]
    path.write_text("1\tgood\tA text\n")
    with pytest.raises(UserError, match=r"movieReviewSnippets_GroundTruth\.txt, line 1: .*expected id, score and text"):
        TextDomains(root=root).load("train")
    path.unlink()
    with pytest.raises(UserError, match=r"movieReviewSnippets_GroundTruth\.txt is missing"):
        TextDomains(root=root).load("train")
    (tmp_path / "a.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"a\.tar\.gz cannot be read"):
        TextDomains(root=tmp_path / "a.tar.gz").load("train")
    with pytest.raises(UserError, match="test_share=1"):
        TextDomains(test_share=1)


@pytest.mark.skipif(not REAL_TEXTS.is_dir(), reason="the texts are not there ($VADER_TEXTS)")
def test_the_real_text_domains():
    train, test = (TextDomains(root=REAL_TEXTS).load(split) for split in ("train", "test"))
    assert len(train) + len(test) == 23320  # 23,703 without scores of 0
    assert train.groups.bincount().tolist() == [3357, 8454, 2832, 3961]


# ------------------------------------------------------------------ metrics


def test_metrics_are_those_of_scikit_learn_and_numpy():
    from sklearn import metrics as reference

    rng = np.random.default_rng(0)
    for _ in range(5):
        a, b = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
        assert f1(a, b) == pytest.approx(reference.f1_score(b, a))
        assert matthews(a, b) == pytest.approx(reference.matthews_corrcoef(b, a))
        x = rng.normal(size=40).round(1)
        y = (x + rng.normal(size=40)).round(1)
        assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
        ranks = [[(np.sum(z < v) + np.sum(z <= v) + 1) / 2 for v in z] for z in (x, y)]
        assert spearman(x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert matthews(np.zeros(3, int), np.array([0, 1, 0])) == 0.0
    assert f1(np.zeros(3, int), np.zeros(3, int)) == 0.0
