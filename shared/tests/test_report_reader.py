"""Reading run folders in whatever state they were left."""

import importlib.util
import json
import logging
from pathlib import Path

import pytest
from polymodal import run_reader
from polymodal.errors import UserError
from polymodal.run_reader import find_runs, flatten, read_run

_spec = importlib.util.spec_from_file_location("_run_factory", Path(__file__).with_name("_run_factory.py"))
factory = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(factory)


def test_a_whole_run_is_read_back(tmp_path):
    curve = {"train/loss": [(10, 0, 2.5), (20, 1, 1.5)], "val/bleu4": [(20, 1, 7.25)]}
    samples = {"test-translations.jsonl": [{"id": "a", "score": 1.23456}, {"id": "b", "words": ["x", "y"]}]}
    run = read_run(factory.write_run(tmp_path / "r", curves=curve, samples=samples, seed=3))
    assert (run.seed, run.finished, run.fingerprint[:4]) == (3, True, "f00d")
    assert run.metrics == {"test/bleu4": 90.0}
    assert run.signatures == {"test/bleu4": factory.SIGNATURE}
    assert [(p.step, p.epoch, p.value) for p in run.curves["train/loss"]] == curve["train/loss"]
    assert run.lookup("fusion.name") == "ssaw"
    assert run.lookup("data.name") == "synthetic"
    assert run.lookup("no.such.key") is None
    (sheet,) = run.sheets()
    assert sheet.name == "test-translations"
    assert sheet.rows == [{"id": "a", "score": "1.235"}, {"id": "b", "words": '["x", "y"]'}]


def test_flatten_keeps_lists_and_empty_groups():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]}) == {"a.b": 1, "a.c": {}, "d": [1, {"e": 2}]}


def test_a_half_written_last_row_and_broken_rows_are_left_out(tmp_path):
    run = factory.write_run(tmp_path / "r", curves={"train/loss": [(1, 0, 2.0), (2, 0, 1.0)]})
    with (run / "metrics.csv").open("a") as handle:
        handle.write("3,0,train/loss,nan\nx,y,z\n4,,train/loss,0.5\n5,0,train/loss,0.2")
    assert [(p.step, p.epoch, p.value) for p in read_run(run).curves["train/loss"]] == [
        (1, 0, 2.0),
        (2, 0, 1.0),
        (4, None, 0.5),
    ]


def test_a_repeated_step_counts_once_with_its_last_value(tmp_path):
    run = factory.write_run(tmp_path / "r", curves={"train/loss": [(2, 0, 9.0), (1, 0, 3.0), (2, 0, 1.0)]})
    assert [(p.step, p.value) for p in read_run(run).curves["train/loss"]] == [(1, 3.0), (2, 1.0)]


def test_a_killed_run_gives_the_last_values_of_its_curves(tmp_path):
    curves = {"val/bleu4": [(10, 0, 5.0), (20, 1, 8.0)]}
    run = read_run(factory.write_run(tmp_path / "r", curves=curves, metrics={}, status="running"))
    assert not run.finished
    assert run.metrics == {"val/bleu4": 8.0}


def test_missing_files_are_no_error(tmp_path, caplog):
    folder = factory.write_run(tmp_path / "r")
    (folder / "metrics.csv").unlink()
    (folder / "config.yaml").unlink()
    run = read_run(folder)
    assert (run.curves, run.config, run.sheets()) == ({}, {}, [])
    assert not caplog.records


def test_a_damaged_config_is_logged_and_left_out(tmp_path, caplog):
    folder = factory.write_run(tmp_path / "r")
    (folder / "config.yaml").write_text("a: [1,\nb")
    with caplog.at_level(logging.WARNING, logger="polymodal"):
        assert read_run(folder).config == {}
    assert "config.yaml cannot be read" in caplog.text


def test_half_written_and_foreign_manifests_are_named_and_skipped(tmp_path):
    factory.write_run(tmp_path / "good")
    for name, text in (("cut", '{"schema_version": 1, "ta'), ("foreign", '{"name": "web app"}'), ("list", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    runs, skipped = find_runs([tmp_path])
    assert [r.path.name for r in runs] == ["good"]
    assert len(skipped) == 3
    assert "cut/manifest.json: not valid JSON at line 1: cut off while it was written?; left out" in skipped[0]


def test_a_newer_schema_is_refused(tmp_path):
    factory.write_run(tmp_path / "r", schema_version=2)
    with pytest.raises(UserError, match=r"schema version 2; this polymodal reads up to 1: install a newer polymodal"):
        find_runs([tmp_path])


def test_an_older_schema_is_migrated(tmp_path, monkeypatch):
    folder = factory.write_run(tmp_path / "r", schema_version=1, method=None)
    monkeypatch.setattr(run_reader, "SCHEMA_VERSION", 2)
    monkeypatch.setitem(run_reader.MIGRATIONS, 1, lambda tree: {**tree, "method": "renamed"})
    run = read_run(folder)
    assert run.manifest["schema_version"] == 2
    assert run.text("method") == "renamed"
    assert json.loads((folder / "manifest.json").read_text())["method"] is None


def test_a_version_that_never_was_is_refused(tmp_path):
    folder = factory.write_run(tmp_path / "r", schema_version=0)
    with pytest.raises(UserError, match="schema version 0 was never released"):
        read_run(folder)


def test_a_folder_without_manifest_names_the_newest_run_below(tmp_path):
    factory.write_run(tmp_path / "slt" / "r")
    with pytest.raises(UserError, match=r"is not a run folder: it has no manifest\.json; the newest one .*slt/r"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="no such folder: .*nowhere"):
        find_runs([tmp_path / "nowhere"])


def test_subfolders_of_a_run_are_not_searched_and_no_run_counts_twice(tmp_path):
    run = factory.write_run(tmp_path / "r")
    factory.write_run(run / "wandb" / "copy")
    factory.write_run(run / "checkpoints" / "copy")
    runs, _ = find_runs([tmp_path, run])
    assert len(runs) == 1


def test_markdown_tables_of_the_run_folder_are_read(tmp_path):
    run = factory.write_run(tmp_path / "r")
    (run / "audit.md").write_text("|  | BLEU-4 |\n|---|---:|\n| ssaw | 92.1 |\n| copy | 3.0 |\n\n**safe**\n")
    (sheet,) = read_run(run).sheets(limit=1)
    assert sheet.rows == [{"": "ssaw", "BLEU-4": "92.1"}]
    assert sheet.lines == ["**safe**"]
