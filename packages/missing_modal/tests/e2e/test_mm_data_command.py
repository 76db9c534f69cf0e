"""``mm-data``: tables, every kind of wrong file, Arrow files that are written, missing tables that are read back."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from missing_modal import data_command
from missing_modal.data.mmimdb import MMIMDb
from missing_modal.tables import load_table, row_ids
from polymodal.testing import one_error

_spec = importlib.util.spec_from_file_location("mm_layouts_command", Path(__file__).parents[1] / "_layouts.py")
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)


@pytest.fixture
def mm_data(call_command):
    """The command in this process."""
    return partial(call_command, data_command.main, "mm-data")


def cells(text):
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {(row[0], row[1]): row[1:] for row in rows}


def test_help_and_unknown_commands(mm_data):
    assert mm_data().code == mm_data("nonsense").code == 2
    result = mm_data("--help")
    for name in ("check", "convert", "show"):
        assert f"  {name} " in result.out
        assert f"usage: mm-data {name}" in mm_data(name, "--help").out


def test_check_finds_nothing_wrong(mm_data, tmp_path):
    result = mm_data("check", "--data", "mmimdb", "--data.root", layouts.write_mmimdb(tmp_path))
    assert result.code == 0, result.err
    assert "train: 12 samples of 6 rows, 0 with problems" in result.out
    assert "note: the published test split has 7799 rows" in result.out
    assert "all files can be used" in result.out


def test_check_names_each_broken_file_once_a_row(mm_data, tmp_path):
    home = layouts.write_mmimdb(tmp_path)
    (home / "images" / "0000102.jpeg").write_bytes(b"no picture")  # a film with three plots
    (home / "images" / "0000301.jpeg").write_bytes(layouts.encoded(1)[:300])
    result = mm_data("check", "--data", "mmimdb", "--data.root", home)
    one_error(result, "2 files of mmimdb cannot be used", "0000102.jpeg is broken", "copy it again")
    assert result.out.count("is broken") == 2
    assert mm_data("check", "--data", "mmimdb", "--data.root", home, "--files", "false").code == 0
    (home / "labels" / "0000200.json").unlink()
    one_error(mm_data("check", "--data", "mmimdb", "--data.root", home), "0000200.json is missing")


def test_check_decodes_all_kinds_of_a_manifest(mm_data, tmp_path):
    path = layouts.write_manifest(tmp_path)
    assert mm_data("check", "--data", path).code == 0
    (tmp_path / "sounds" / "2.wav").write_bytes(b"RIFF")
    result = mm_data("check", "--data", path)
    one_error(result, "1 file of manifest", "2.wav cannot be read (cut short)", "ffmpeg")
    one_error(mm_data("check"), "no file given")


def test_show_gives_shapes_of_arrays_and_short_rows_of_numbers(mm_data):
    result = mm_data("show", "--data", "world", "--data.sizes", "[20, 10, 10]")
    assert result.code == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.startswith("train world-train-00000")]
    assert re.fullmatch(
        r"train world-train-00000: \[(plus|minus)\] image 8 x 4 numbers \| text \[25( +\d+){3} 26\]", line
    )


def test_show_tells_what_the_table_takes_from_what_is_there(mm_data, tmp_path):
    rows = [
        {"id": f"r{i}", "text": None if i < 2 else f"text {i}", "image": "a.png", "label": "xy"[i % 2], "split": split}
        for split, count in (("train", 20), ("test", 10))
        for i in range(count)
    ]
    rows = [row | {"id": row["split"] + row["id"]} for row in rows]
    layouts.put(tmp_path / "a.png", layouts.encoded(0, "PNG"))
    layouts.put(tmp_path / "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    show = ("show", "--data", tmp_path / "d.jsonl", "--missing.ratio", "0.5")
    result = mm_data(*show, "--missing.kind", "image", "--out", tmp_path / "tables")
    assert result.code == 0, result.err
    table = cells(result.out)
    assert table["train", "as it is"] == ["as it is", "18", "2", "0"]
    taken = [int(one) for one in table["train", "with the table"][1:]]
    assert sum(taken) == 20
    assert 8 <= taken[2] <= 10  # ten rows, less those that would be left with nothing
    assert table["x", "0"] == ["0", "10", "0", "5"]
    samples = json.loads((tmp_path / "tables" / "manifest_train_missing_image_05_seed0.json").read_text())
    assert samples["rows"] == 20
    again = mm_data(*show, "--missing.kind", "image", "--missing.tables", tmp_path / "tables")
    assert cells(again.out) == table
    one_error(mm_data(*show, "--missing.kind", "text", "--missing.tables", tmp_path / "tables"), "no missing table")


def test_tables_have_a_row_a_film(mm_data, tmp_path):
    home = layouts.write_mmimdb(tmp_path / "d")
    result = mm_data("show", "--data", "mmimdb", "--data.root", home, "--out", tmp_path / "t")
    assert result.code == 0, result.err
    assert cells(result.out)["train", "12"] == ["12", "6", "15552"]
    rows = row_ids(MMIMDb(root=home).samples("train"))
    table = load_table(tmp_path / "t" / "mmimdb_train_missing_both_07_seed0.json", rows, "mmimdb", "train")
    assert sum(mask != 3 for mask in table.masks.values()) == 4  # int(6 * 0.7)


def test_convert(mm_data, tmp_path):
    pytest.importorskip("pyarrow")
    raw = layouts.write_food101(tmp_path / "raw")
    convert = ("convert", "--data", "food101", "--data.root", raw)
    one_error(mm_data(*convert), "--out is missing")
    result = mm_data(*convert, "--out", tmp_path / "arrow")
    assert result.code == 0, result.err
    assert f"{tmp_path / 'arrow' / 'food101_train.arrow'}: 5 rows" in result.out
    before = (tmp_path / "arrow" / "food101_val.arrow").read_bytes()
    one_error(mm_data(*convert, "--out", tmp_path / "arrow"), "food101_train.arrow exists", "--overwrite true")
    assert mm_data(*convert, "--out", tmp_path / "arrow", "--overwrite", "true").code == 0
    assert (tmp_path / "arrow" / "food101_val.arrow").read_bytes() == before
    assert mm_data("check", "--data", "food101", "--data.root", tmp_path / "arrow").code == 0
    one_error(mm_data("convert", "--data", "food101", "--data.root", tmp_path / "arrow", "--out", tmp_path / "x"),
           "holds Arrow files already")  # fmt: skip
    (raw / "images" / "test" / "apple_pie" / "apple_pie_100.jpg").unlink()
    one_error(mm_data(*convert, "--out", tmp_path / "new"), "apple_pie_100.jpg is missing")
    assert not (tmp_path / "new" / "food101_test.arrow").exists()
    assert not list((tmp_path / "new").glob(".*"))


def test_convert_refuses_own_rows(mm_data, tmp_path):
    path = layouts.write_manifest(tmp_path)
    one_error(mm_data("convert", "--data", path, "--out", tmp_path / "x"), "only mmimdb, food101 and hatememes")


def test_no_torch_for_lists_and_tables(tmp_path):
    """The command, its readers and tables answer without torch."""
    home = layouts.write_mmimdb(tmp_path)
    code = (
        "import sys; from missing_modal.data_command import main\n"
        f"sys.argv = ['mm-data', 'show', '--data', 'mmimdb', '--data.root', {str(home)!r}]\n"
        "assert main() == 0; assert 'torch' not in sys.modules and 'open_clip' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
