"""Missing tables: nested, order-free, exact in number; files that are checked."""

import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from missing_modal.data.base import MissingConfig, Sample
from missing_modal.patterns import all_masks, mask_name
from missing_modal.tables import (
    canonical_kind,
    combine,
    draw_table,
    load_table,
    missing_table,
    natural_mask,
    row_ids,
    save_table,
    table_for,
    table_name,
)
from polymodal.errors import UserError

THREE = ("image", "text", "audio")
IDS = [f"id{number}" for number in range(40)]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 80),
    st.sampled_from(["text", "image", "both", "any"]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_nested_in_the_ratio_and_exact_in_number(count, kind, first, second, seed):
    ids = [str(number) for number in range(count)]
    small, large = (missing_table(ids, kind, ratio, seed, "d", "train") for ratio in sorted((first, second)))
    assert all(large[row] == pattern for row, pattern in small.items() if pattern != 0)
    for table, ratio in ((small, min(first, second)), (large, max(first, second))):
        codes = list(table.values())
        lacking = int(count * ratio)
        assert count - codes.count(0) == lacking
        if kind == "both":
            assert (codes.count(1), codes.count(2)) == (lacking - lacking // 2, lacking // 2)
        if kind in ("text", "image"):
            assert codes.count({"text": 2, "image": 1}[kind]) == 0


@settings(max_examples=20, deadline=None)
@given(st.randoms(), st.sampled_from(["any", "only:audio"]), st.floats(0, 1))
def test_order_of_ids_does_not_matter(draw, kind, ratio):
    shuffled = list(IDS)
    draw.shuffle(shuffled)
    assert missing_table(shuffled, kind, ratio, 1, "d", "val", THREE) == missing_table(
        IDS, kind, ratio, 1, "d", "val", THREE
    )


def test_seed_data_set_split_and_kind_draw_apart():
    base = missing_table(IDS, "text", 0.5, 0, "d", "train")
    others = [
        missing_table(IDS, "text", 0.5, 1, "d", "train"),
        missing_table(IDS, "text", 0.5, 0, "e", "train"),
        missing_table(IDS, "text", 0.5, 0, "d", "test"),
    ]
    assert all(base != other for other in others)
    image = missing_table(IDS, "image", 0.5, 0, "d", "train")
    assert {row for row, code in image.items() if code} != {row for row, code in base.items() if code}


def test_three_modalities():
    full = frozenset(THREE)
    audio = missing_table(IDS, "only:audio", 0.25, 0, "d", "train", THREE)
    assert sorted(map(len, audio.values())) == [2] * 10 + [3] * 30
    assert set(audio.values()) == {full, full - {"audio"}}
    mixed = missing_table(IDS, "any", 1.0, 0, "d", "train", THREE)
    assert full not in mixed.values()
    assert frozenset() not in mixed.values()
    assert len(set(mixed.values())) == 6
    complete = missing_table(IDS, "none", 0.7, 0, "d", "train", THREE)
    assert set(complete.values()) == {full}


def test_any_is_uniform_or_weighted():
    ids = [str(number) for number in range(6000)]
    counts = draw_table(ids, "any", 1.0, 0, "d", "train", THREE).counts()
    assert counts.pop("complete") == 0
    assert all(abs(count - 1000) < 150 for count in counts.values())
    weights = {"image": 3.0, "text+audio": 1.0}
    weighted = draw_table(ids, "any", 1.0, 0, "d", "train", THREE, weights).counts()
    assert abs(weighted["image"] - 4500) < 150
    assert weighted["image"] + weighted["text+audio"] == 6000
    # The ratio does not move what a row lacks.
    half = draw_table(ids, "any", 0.5, 0, "d", "train", THREE, weights).masks
    whole = draw_table(ids, "any", 1.0, 0, "d", "train", THREE, weights).masks
    assert all(whole[row] == mask for row, mask in half.items() if mask != 7)


def test_one_meaning_has_one_table():
    assert canonical_kind("only:image") == "image"
    assert canonical_kind("audio", THREE) == "only:audio"
    assert missing_table(IDS, "audio", 0.5, 0, "d", "train", THREE) == missing_table(
        IDS, "only:audio", 0.5, 0, "d", "train", THREE
    )


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("imgae", 0.5, 0), {}, "did you mean image"),
        (("both", 0.5, 0), {"modalities": THREE}, "expected one of none, any, only:image"),
        (("both", 1.5, 0), {}, "share from 0 to 1"),
        (("both", float("nan"), 0), {}, "share from 0 to 1"),
        (("both", 0.5, -1), {}, "0 or more"),
        (("any", 0.5, 0), {"weights": {"image": -1.0, "text": 2.0}}, "weights >= 0"),
        (("any", 0.5, 0), {"weights": {"complete": 1.0}}, "incomplete patterns"),
        (("any", 0.5, 0), {"weights": {"image": 0.0}}, "not all 0"),
        (("any", 0.5, 0), {"weights": {"sound": 1.0}}, "unknown modality 'sound'"),
        (("any", 0.5, 0), {"modalities": ("image",)}, "expected one of none"),
    ],
)
def test_bad_arguments(arguments, options, words):
    with pytest.raises(UserError, match=words) as caught:
        missing_table(IDS, *arguments, "d", "train", **options)
    assert "\n" not in str(caught.value)


def test_a_row_twice():
    with pytest.raises(UserError, match="row b occurs twice"):
        missing_table(["b", "a", "b"], "text", 0.5, 0, "d", "train")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 15), st.integers(1, 15))
def test_the_table_only_removes(natural, table):
    left = combine(natural, table)
    assert left
    assert left & ~natural == 0
    assert left == natural or left == natural & table
    assert combine(natural, 15) == natural


def test_real_nulls_and_rows_of_samples():
    assert natural_mask({"image": "a.png", "text": None}, ("image", "text")) == 1
    assert natural_mask({"image": b"", "text": ""}, ("image", "text")) == 3
    assert natural_mask({"audio": "a.wav"}, THREE) == 4
    samples = [Sample("a#0", {}, 0, "a"), Sample("a#1", {}, 0, "a"), Sample("b", {}, 1)]
    assert row_ids(samples) == ["a", "b"]


# ------------------------------------------------------------------ files


def saved(tmp_path, **changes):
    options = {"kind": "both", "ratio": 0.7, "seed": 0, "dataset": "d", "split": "train", **changes}
    table = draw_table(IDS, **options)
    path = tmp_path / "table.json"
    save_table(path, table)
    return path, table


@pytest.mark.parametrize(
    ("kind", "modalities", "weights"),
    [("both", ("image", "text"), {}), ("any", THREE, {"image": 1.0, "text+audio": 2.0}), ("none", THREE, {})],
)
def test_save_and_load(tmp_path, kind, modalities, weights):
    path, table = saved(tmp_path, kind=kind, modalities=modalities, weights=weights)
    assert load_table(path, list(reversed(IDS)), "d", "train", modalities) == table
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["counts"] == {
        mask_name(m, modalities): list(table.masks.values()).count(m) for m in all_masks(modalities)
    }
    assert record["patterns"].keys() == set(IDS)
    first = path.read_bytes()
    save_table(path, table)
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("ids", "dataset", "split", "modalities", "words"),
    [
        (IDS, "e", "train", ("image", "text"), "dataset is d, this data's is e"),
        (IDS, "d", "test", ("image", "text"), "split is train, this data's is test"),
        (IDS, "d", "train", THREE, "modalities is"),
        (IDS[1:], "d", "train", ("image", "text"), "id0 is in one only"),
        ([*IDS, "new"], "d", "train", ("image", "text"), "new is in one only"),
        ([*IDS[1:], "new"], "d", "train", ("image", "text"), "40 other rows than the 40 here"),
    ],
)
def test_the_table_of_another_set(tmp_path, ids, dataset, split, modalities, words):
    path, _ = saved(tmp_path)
    with pytest.raises(UserError, match=words):
        load_table(path, ids, dataset, split, modalities)


def damage(text):
    return text.replace('"id3": ', '"id03": ', 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-40], "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: "{}", "damaged"),
        (lambda text: text.replace('"ratio": 0.7', '"ratio": 0.5'), "checksum"),
        (damage, "checksum"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "newer than 1"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 0'), "damaged"),
        (lambda text: text.replace("missing_modal.table", "other"), "damaged"),
        (lambda text: "\x00\xff", "damaged"),
    ],
)
def test_damaged_files(tmp_path, change, words):
    path, _ = saved(tmp_path)
    path.write_bytes(change(path.read_text(encoding="utf-8")).encode("latin-1"))
    with pytest.raises(UserError, match=words) as caught:
        load_table(path, IDS, "d", "train")
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="nothing.json is missing"):
        load_table(tmp_path / "nothing.json", IDS, "d", "train")


# ------------------------------------------------------------------ official files


def official(tmp_path, values, name="mmimdb_train_missing_both_07.pt"):
    path = tmp_path / name
    torch.save(values, path)
    return path


def test_official_file_follows_the_order_of_the_rows(tmp_path):
    rows = ["z", "a", "m"]
    path = official(tmp_path, torch.tensor([0.0, 1.0, 2.0]))
    table = load_table(path, rows, "mmimdb", "train")
    assert table.patterns == {"z": 0, "a": 1, "m": 2}
    assert (table.kind, table.seed, table.ratio) == ("custom", None, pytest.approx(2 / 3))
    # Written down as ours, with the ids it belongs to, it comes back the same.
    save_table(tmp_path / "ours.json", table)
    assert load_table(tmp_path / "ours.json", sorted(rows), "mmimdb", "train") == table


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.tensor([0.0, 1.0]), "has 2 rows, mmimdb train has 3"),
        (torch.tensor([0.0, 1.0, 3.0]), "other than 0, 1, 2"),
        (torch.tensor([0.0, float("nan"), 1.0]), "other than 0, 1, 2"),
        (torch.zeros(3, 1), "no tensor of one axis"),
        ({"table": torch.zeros(3)}, "no tensor of one axis"),
        (torch.zeros(1 << 20), "at most"),
    ],
)
def test_bad_official_files(tmp_path, values, words):
    with pytest.raises(UserError, match=words):
        load_table(official(tmp_path, values), ["a", "b", "c"], "mmimdb", "train")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_sparse_official_file(tmp_path):
    with pytest.raises(UserError, match="no tensor of one axis"):
        load_table(official(tmp_path, torch.zeros(3).to_sparse()), ["a", "b", "c"], "mmimdb", "train")


class Evil:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('owned').touch()",))


def test_official_file_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = official(tmp_path, Evil())
    with pytest.raises(UserError, match="cannot be read"):
        load_table(path, ["a"], "mmimdb", "train")
    path.write_bytes(b"no zip at all")
    with pytest.raises(UserError, match="cannot be read"):
        load_table(path, ["a"], "mmimdb", "train")
    assert not (tmp_path / "owned").exists()


def test_official_file_with_other_modalities(tmp_path):
    with pytest.raises(UserError, match="image and text"):
        load_table(official(tmp_path, torch.zeros(1)), ["a"], "mmimdb", "train", THREE)


# ------------------------------------------------------------------ settings


def test_settings_of_val_and_test():
    config = MissingConfig(kind="text", ratio=0.5, test_kind="image", test_ratio=0.25, seed=4)
    train, test = (table_for(config, IDS, "d", split) for split in ("train", "test"))
    assert (train.kind, train.ratio, train.seed) == ("text", 0.5, 4)
    assert (test.kind, test.ratio, test.seed) == ("image", 0.25, 4)
    assert table_for(config, IDS, "d", "val").kind == "image"
    assert table_for(MissingConfig(test_ratio=0.0), IDS, "d", "test").counts()["complete"] == len(IDS)


def test_folder_of_tables(tmp_path):
    config = MissingConfig(kind="both", ratio=0.7, seed=2, tables=tmp_path)
    with pytest.raises(UserError, match="no missing table for val in .*d_val_missing_both_07_seed2.json"):
        table_for(config, IDS, "d", "val")
    torch.save(torch.ones(len(IDS)), tmp_path / "d_dev_missing_both_07.pt")
    assert table_for(config, IDS, "d", "val").counts()["image"] == len(IDS)
    ours = draw_table(IDS, "both", 0.7, 2, "d", "val")
    save_table(tmp_path / table_name("d", "val", "both", 0.7, 2), ours)
    assert table_for(config, IDS, "d", "val") == ours


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratio": 0.5}, "its ratio is 0.7, the settings say 0.5"),
        ({"kind": "text"}, "its kind is both, the settings say text"),
        ({"seed": 1}, "its seed is 0, the settings say 1"),
    ],
)
def test_a_table_of_other_settings(tmp_path, changes, words):
    save_table(tmp_path / "train.json", draw_table(IDS, "both", 0.7, 0, "d", "train"))
    assert table_for(MissingConfig(tables=tmp_path), IDS, "d", "train").seed == 0
    with pytest.raises(UserError, match=words):
        table_for(MissingConfig(**{"tables": tmp_path, **changes}), IDS, "d", "train")


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        table_for(MissingConfig(tables=tmp_path / "no"), IDS, "d", "train")


def test_seed_enters_as_specified():
    # The first place of the permutation is the first row to lack something.
    name = zlib.crc32(b"d|train|only:audio")
    first = np.random.default_rng(np.random.SeedSequence([9, name])).permutation(len(IDS))[0]
    table = missing_table(IDS, "only:audio", 1 / len(IDS), 9, "d", "train", THREE)
    assert [row for row, pattern in table.items() if len(pattern) == 2] == [sorted(IDS)[first]]


def test_no_torch_is_loaded():
    code = "import sys, missing_modal.tables, missing_modal.metrics, missing_modal.matrix, missing_modal.calibration\n"
    code += "import missing_modal.official_tables\nassert not {'torch', 'lightning', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
