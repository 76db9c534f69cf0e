"""Differences of configuration and metrics between runs."""

import importlib.util
from pathlib import Path

import pytest
from polymodal.compare import compare, config_differences
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("_run_factory", Path(__file__).with_name("_run_factory.py"))
factory = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(factory)


def test_config_and_metric_differences(tmp_path):
    config = {"model": {"dim": 64, "fusion": "ssaw"}, "out": "x", "lr": 0.001}
    a = factory.write_run(tmp_path / "a", config=config, metrics={"test/bleu4": 90.0, "test/nll": 1.5})
    other = {"model": {"dim": 64, "fusion": "none"}, "out": "y", "clip": None}
    b = factory.write_run(tmp_path / "b", config=other, metrics={"test/bleu4": 48.5}, method="none", threads=2)
    found = compare([a, b])
    assert found.config == [("clip", ["–", "null"]), ("lr", ["0.001", "–"]), ("model.fusion", ["ssaw", "none"])]
    assert found.facts == [("method", ["ssaw", "none"]), ("threads", ["1", "2"])]
    assert found.warnings == []
    text = found.to_markdown()
    assert "| test/bleu4 |  90.00 | 48.50 | -41.50 |" in text
    assert "| test/nll   | 1.5000 |     – |      – |" in text


def test_equal_runs_say_so(tmp_path):
    runs = [factory.write_run(tmp_path / name, config={"a": 1}) for name in "abc"]
    text = compare(runs).to_markdown()
    assert "the configurations are equal" in text
    assert "nothing differs" in text
    assert "- C: " in text
    assert "B − A" not in text


def test_warnings_where_scores_are_not_comparable(tmp_path):
    a = factory.write_run(tmp_path / "a")
    b = factory.write_run(
        tmp_path / "b", data={"fingerprint": "beef"}, metric_signatures={"test/bleu4": "char"}, status="interrupted"
    )
    warnings = compare([a, b]).warnings
    assert warnings[0] == "the data differ (A f00df00df00d, B beef): their scores are not comparable"
    assert warnings[1].startswith("test/bleu4 is defined differently: bleu|lang:de")
    assert warnings[2] == "B did not finish: the values are the last ones logged"


def test_bad_paths_are_one_line(tmp_path):
    a = factory.write_run(tmp_path / "a")
    with pytest.raises(UserError, match="1 run given; expected two or more"):
        compare([a])
    with pytest.raises(UserError, match="is not a run folder"):
        compare([a, tmp_path / "nowhere"])


def test_groups_with_equal_value_sets_do_not_differ():
    groups = {
        "a": [{"seed": 0, "x": 1, "mode": "m"}, {"seed": 1, "x": 1, "mode": "n"}],
        "b": [{"seed": 0, "x": 2}, {"seed": 1, "x": 2}],
    }
    assert config_differences(groups) == [("mode", ["m, n", "–"]), ("x", ["1", "2"])]
