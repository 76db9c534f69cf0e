"""Text sets in their official layouts: every sample, every label, and what is said of broken files."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from fedcore.data import reader_class
from fedcore.data.text_ids import hash_ids
from fedcore.data.text_rows import majority, tree_rows
from fedcore.data.text_set import stratified
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("fed_layouts_sets", Path(__file__).parents[1] / "_text_layouts.py")
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)


def ids(text):
    """Token ids of single words, up to 64."""
    return hash_ids([text], 1, 16384, 64)


def found(data, split):
    """Labels and token ids of a split, without padding."""
    read = data.load(split)
    return [(int(y), x[x != 0].tolist()) for x, y in zip(read.inputs, read.targets, strict=True)]


# ------------------------------------------------------------------ every set


@pytest.mark.parametrize("name", [name for name in layouts.WRITERS if name != "mr"])
def test_all_samples_are_read_in_order_with_their_labels(name, tmp_path):
    root, classes, expected = layouts.WRITERS[name](tmp_path)
    data = reader_class(name)(root=root, ngrams=1)
    assert data.class_names() == list(classes)
    for split in ("train", "test"):
        assert found(data, split) == [(label, ids(text)) for label, text in expected[split]]
    inside = [folder for folder in root.iterdir() if folder.is_dir()]
    if len(inside) == 1:  # the official folder itself
        assert reader_class(name)(root=inside[0], ngrams=1).fingerprint() == data.fingerprint()


@pytest.mark.parametrize("name", list(layouts.WRITERS))
def test_plain_tables_are_read_where_the_official_files_are_missing(name, tmp_path):
    data = reader_class(name)(root=tmp_path, ngrams=1)
    names = data.class_names()
    rows = [{"text": f"text {i}", "label": i % len(names)} for i in range(2 * len(names))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.tsv").write_text("".join(["label\ttext\n", *(f"{label}\tof {label}\n" for label in names)]))
    data.check()
    assert found(data, "train") == [(i % len(names), ids(f"text {i}")) for i in range(len(rows))]
    assert found(data, "test") == [(i, ids(f"of {label}")) for i, label in enumerate(names)]
    (tmp_path / "test.tsv").write_text("label\ttext\n99\ta\n")
    with pytest.raises(UserError, match=rf"test\.tsv, row 1: label '99'; expected 0\.\.{len(names) - 1} or"):
        reader_class(name)(root=tmp_path).load("test")


@pytest.mark.parametrize("name", list(layouts.WRITERS))
def test_an_empty_folder_is_one_line_with_a_remedy(name, tmp_path):
    with pytest.raises(UserError) as missing:
        reader_class(name)(root=tmp_path).check()
    assert str(tmp_path) in str(missing.value)
    assert reader_class(name).remedy in str(missing.value)
    assert "\n" not in str(missing.value)


# ------------------------------------------------------------------ subsets


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 70), st.integers(0, 3))
def test_a_subset_keeps_the_shares_of_the_classes(labels, count, seed):
    chosen = stratified(labels, count, seed, "train")
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == (min(count, len(labels)) if count else len(labels))
    known, kept = np.bincount(labels, minlength=5), np.bincount(np.array(labels)[chosen], minlength=5)
    assert (np.abs(kept - known * len(chosen) / len(labels)) < 1).all()
    assert chosen.tolist() == stratified(labels, count, seed, "train").tolist()


def test_subsets_are_chosen_by_a_seed_of_their_own(tmp_path):
    root, _, _ = layouts.WRITERS["dbpedia"](tmp_path)
    made = reader_class("dbpedia")
    assert (made.train_samples, made.test_samples) == (50_000, 10_000)
    assert (reader_class("yahoo_answers").train_samples, reader_class("imdb").train_samples) == (100_000, 0)
    whole = found(made(root=root, ngrams=1), "train")
    part = made(root=root, ngrams=1, train_samples=14, test_samples=14)
    assert sorted(part.load("train").targets.tolist()) == list(range(14))
    assert all(sample in whole for sample in found(part, "train"))
    other = made(root=root, ngrams=1, train_samples=14, test_samples=14, subset_seed=1)
    assert found(other, "train") != found(part, "train")
    with pytest.raises(UserError, match=r"train_samples=-1; expected 0 \(all\) or more"):
        made(train_samples=-1)


# ------------------------------------------------------------------ CSV


def test_a_header_is_skipped_and_a_cell_may_hold_a_line_break(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text('Class Index,Title,Description\n3,"Two\nlines",end\n\n1,a,b\n', "utf-8")
    assert found(reader_class("ag_news")(root=tmp_path, ngrams=1), "train") == [
        (2, ids("Two lines end")),
        (0, ids("a b")),
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("ag_news", b'"1","title"\n', r"row 1 has 2 columns; expected 3: class, title, description; unpack ag_news"),
        ("dbpedia", b"1,a,b\n15,a,b\n", r"row 2: class '15'; expected 1\.\.14"),
        ("dbpedia", b"1,a,b\nx,a,b\n", "row 2: class 'x'"),
        ("yahoo_answers", b"1,q,c,a\n1,q,c\n", "row 2 has 3 columns; expected 4: class, question title"),
        ("yelp", b"1,a\n6,b\n", r"row 2: class '6'; expected 1\.\.5"),
        ("ag_news", b"1,a,caf\xe9\n", r"cannot be read as CSV .*utf-8"),
        ("ag_news", b'1,a,"' + b"x" * (1 << 25) + b'"\n', "cannot be read as CSV .*field larger"),
        ("ag_news", b"class,title,description\n", "the train split is empty"),
    ],
)
def test_a_broken_csv_is_named_with_its_row(name, content, said, tmp_path):
    (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(UserError, match=said) as broken:
        reader_class(name)(root=tmp_path).load("train")
    assert "train" in str(broken.value)
    assert reader_class(name).remedy in str(broken.value)


def test_yelp_has_two_kinds(tmp_path):
    root, _, _ = layouts.WRITERS["yelp"](tmp_path)
    layouts.zhang(tmp_path / "yelp_review_polarity_csv", 2, 1)
    made = reader_class("yelp")
    assert made(root=root).num_classes == 5
    assert made(root=root, kind="polarity").class_names() == ["negative", "positive"]
    assert len(made(root=root, kind="polarity").load("train")) == 4
    with pytest.raises(UserError, match=r"class '3'; expected 1\.\.2"):
        made(root=root / "yelp_review_full_csv", kind="polarity").load("train")
    with pytest.raises(UserError, match="kind='half'; expected full"):
        made(kind="half")


# ------------------------------------------------------------------ folders


def test_imdb_says_what_is_missing(tmp_path):
    root, _, _ = layouts.WRITERS["imdb"](tmp_path)
    (path,) = (root / "aclImdb" / "test" / "pos").glob("10_*.txt")
    path.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"10_9\.txt is not utf-8; unpack aclImdb"):
        reader_class("imdb")(root=root).load("test")
    for path in (root / "aclImdb" / "test" / "pos").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"test.pos has no files; unpack aclImdb"):
        reader_class("imdb")(root=root).load("test")


def test_headers_of_messages_are_left_out_unless_wanted(tmp_path):
    root, groups, _ = layouts.WRITERS["newsgroups20"](tmp_path)
    assert len(groups) == 20
    with_headers = reader_class("newsgroups20")(root=root, ngrams=1, headers=True)
    first = found(with_headers, "train")[0][1]
    assert first[: len(ids("From: someone@example.org"))] == ids("From: someone@example.org")
    (root / "20news-bydate" / "20news-bydate-train" / "sci.med" / "55").unlink()
    (root / "20news-bydate" / "20news-bydate-train" / "sci.med").rmdir()
    with pytest.raises(UserError, match=r"sci\.med does not exist; unpack 20news-bydate"):
        reader_class("newsgroups20")(root=root).load("train")


def test_mr_holds_out_a_tenth_of_each_class(tmp_path):
    root, _, expected = layouts.WRITERS["mr"](tmp_path)
    data = reader_class("mr")(root=root, ngrams=1)
    train, test = found(data, "train"), found(data, "test")
    assert ([label for label, _ in train].count(0), len(train)) == (18, 36)
    assert [label for label, _ in test] == [0, 0, 1, 1]
    assert sorted(train + test) == sorted((label, ids(text)) for label, text in expected["both"])
    assert found(reader_class("mr")(root=root, ngrams=1), "test") == test
    other = reader_class("mr")(root=root, ngrams=1, split_seed=1, test_share=0.5)
    assert len(other.load("test")) == 20
    (root / "rt-polaritydata" / "rt-polarity.pos").unlink()
    with pytest.raises(UserError, match=r"rt-polarity\.pos is missing; unpack rt-polaritydata"):
        reader_class("mr")(root=root).load("test")
    with pytest.raises(UserError, match="test_share=1"):
        reader_class("mr")(test_share=1)


def test_mr_reads_whole_reviews_too(tmp_path):
    for name in ("neg", "pos"):
        (tmp_path / "review_polarity" / "txt_sentoken" / name).mkdir(parents=True)
        for i in range(10):
            path = tmp_path / "review_polarity" / "txt_sentoken" / name / f"cv{i:03}_{i * 7}.txt"
            path.write_text(f"a {name} film\nof {i}\n")
    for root in (tmp_path, tmp_path / "review_polarity", tmp_path / "review_polarity" / "txt_sentoken"):
        data = reader_class("mr")(root=root, ngrams=1)
        assert (len(data.load("train")), data.load("test").targets.tolist()) == (18, [0, 1])


# ------------------------------------------------------------------ lines, trees, posts


def test_lines_of_emotion_end_in_a_label(tmp_path):
    root, _, _ = layouts.WRITERS["emotion"](tmp_path)
    for line, said in (
        ("no label here", "line 2: 'no label here'; expected text;label"),
        ("hm;happy", "label 'happy'"),
    ):
        (root / "test.txt").write_text(f"i feel fine;joy\n{line}\n")
        with pytest.raises(UserError, match=said):
            reader_class("emotion")(root=root).load("test")
    (root / "test.txt").unlink()
    with pytest.raises(UserError, match=r"test\.txt is missing; give the folder with train\.txt"):
        reader_class("emotion")(root=root).load("test")


@pytest.mark.parametrize("line", ["(5 (2 A) (2 film))", "(3 (2 A) (2 film)", "(3 )", "3 (2 A)", "A film\t3"])
def test_a_line_that_is_no_tree_is_named(line, tmp_path):
    (tmp_path / "train.txt").write_text(f"(4 (2 A) (4 (3 great) (2 film)))\n{line}\n")
    with pytest.raises(UserError, match=r"train\.txt, line 2: .*expected a tree such as"):
        reader_class("sst5")(root=tmp_path).load("train")
    rows = tree_rows(tmp_path / "train.txt", "sst5", "copy it again")
    assert next(rows) == (4, "A great film")


def test_the_majority_of_annotators_decides():
    assert majority(["a", "b", "a"]) == "a"
    assert majority(["a", "b", "c"]) == majority(["a", "a", "b", "b"]) == majority([]) == ""


def test_hatexplain_says_what_is_missing_or_broken(tmp_path, caplog):
    root, _, _ = layouts.WRITERS["hatexplain"](tmp_path)
    with caplog.at_level("INFO"):
        reader_class("hatexplain")(root=root).check()
    assert "1 posts of train without a majority left out" in caplog.text
    path = root / "Data" / "dataset.json"
    posts = json.loads(path.read_text())
    for change, said in (
        ({"0_test": layouts.post("0_test", ["hate"] * 3, ["a"])}, "row 1: label 'hate'; expected 0..2 or hatespeech"),
        ({"0_test": {"post_id": "0_test"}}, "no labels and tokens of the post '0_test' .test.; give the folder Data"),
    ):
        path.write_text(json.dumps({**posts, **change}))
        with pytest.raises(UserError, match=said):
            reader_class("hatexplain")(root=root).load("test")
    for content, said in (("[1]", "holds no object"), ('{"a": ', "cannot be read as JSON")):
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            reader_class("hatexplain")(root=root).load("test")
    path.unlink()
    with pytest.raises(UserError, match=r"dataset\.json is missing; give the folder Data"):
        reader_class("hatexplain")(root=root).load("test")


# ------------------------------------------------------------------ models


def test_the_order_of_words_is_left_to_the_transformer(tmp_path):
    data = reader_class("imdb")(root=tmp_path)
    data.fit_to_model("bag")
    assert data.ngrams == 2
    data.fit_to_model("text_transformer")
    assert data.ngrams == 1
    chosen = reader_class("imdb")(root=tmp_path, ngrams=3)
    chosen.fit_to_model("text_transformer")
    assert chosen.ngrams == 3
