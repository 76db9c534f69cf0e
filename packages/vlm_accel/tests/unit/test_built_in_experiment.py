"""What the committed results of the experiment on the built-in model say, and that the table is written from them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from polymodal.cli import parse_config
from vlm_accel.bench.cases import all_cases
from vlm_accel.bench.settings import BenchConfig

FOLDER = Path(__file__).parents[2] / "experiments"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="experiments are not part of the installed package")


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("built_in_experiment", FOLDER / "built_in.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(experiment: ModuleType) -> dict:
    return experiment.read()


def test_every_row_has_three_seeds_and_the_settings_of_the_file(experiment: ModuleType, found: dict) -> None:
    config = parse_config(BenchConfig, ["--config", str(FOLDER / "built_in.yaml")], presets="vlm_accel")
    cases = {case.label: case for case in all_cases(config)}
    assert list(found) == experiment.rows() == ["full", *cases]
    for label, records in found.items():
        assert tuple(sorted(records)) == experiment.SEEDS, label
        for record in records.values():
            assert record["status"] == "finished", label
            assert record["settings"]["case"] == (None if label == "full" else cases[label].settings())
            assert record["settings"]["data"] == found["full"][0]["settings"]["data"]


def test_the_table_is_written_from_the_committed_rows(experiment: ModuleType) -> None:
    assert experiment.report() == (FOLDER / "results" / "built_in" / "table.md").read_text(encoding="utf-8")


def difference(experiment: ModuleType, found: dict, ours: str, other: str, column: str) -> list[float]:
    a, b = (experiment.values(found[label], *experiment.COLUMNS[column]) for label in (ours, other))
    return [a[seed] - b[seed] for seed in experiment.SEEDS]


def test_scores_beat_random_clearly_in_the_encoder(experiment: ModuleType, found: dict) -> None:
    for share in ("50", "30"):
        for rule in ("drop", "recycle", "rank1"):
            gains = difference(experiment, found, f"vision{share}_{rule}", f"vision{share}_random", "all %")
            assert min(gains) > 8, (share, rule, gains)


def test_scores_beat_random_in_the_decoder_and_in_the_cache(experiment: ModuleType, found: dict) -> None:
    """Where the first answer token is a digit; nothing is asserted of sentences, nor of merging over dropping."""
    pairs = [(f"llm{at}_drop", f"llm{at}_random", "digits %") for at in ("35_123", "15_123", "15_234")]
    pairs += [("kv24_window_kv", "kv24_random_kv", "both %")]
    for ours, other, column in pairs:
        gains = difference(experiment, found, ours, other, column)
        assert sum(gains) / len(gains) > 2, (ours, gains)


def test_recycling_and_merging_lose_little_against_dropping(experiment: ModuleType, found: dict) -> None:
    for ours, other in (("vision30_recycle", "vision30_drop"), ("llm15_123_lightvlm", "llm15_123_drop")):
        gains = difference(experiment, found, ours, other, "all %")
        assert sum(gains) / len(gains) > -2, (ours, gains)


def test_no_result_names_a_folder_of_a_machine() -> None:
    for path in (FOLDER / "results" / "built_in").glob("*.json"):
        assert '"/' not in path.read_text(encoding="utf-8"), path
