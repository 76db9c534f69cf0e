"""What the committed results on the two-modality world say, and that their table is written from them."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path
from types import ModuleType

import pytest
from missing_modal.methods import METHODS

FOLDER = Path(__file__).parents[2] / "experiments"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="experiments are not part of the installed package")


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("world_experiment", FOLDER / "world.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(experiment: ModuleType) -> dict:
    return experiment.read()


def test_all_methods_and_seeds_are_there_on_the_same_data(experiment: ModuleType, found: dict) -> None:
    assert set(experiment.METHODS) == {row.name for row in METHODS} - {"mmp_vilt"}  # that one needs a ViLT
    assert list(found) == list(experiment.METHODS)
    for columns in found.values():
        assert list(columns) == list(experiment.COLUMNS)
        assert all(tuple(by_seed) == experiment.SEEDS for by_seed in columns.values())
    records = [json.loads(path.read_text()) for path in sorted((experiment.RESULTS / "cells").glob("*.json"))]
    assert len(records) == 3 * 3 * len(experiment.METHODS)
    assert len({record["data"]["fingerprint"] for record in records}) == 1
    for record in records:
        assert not Path(record["run"]).is_absolute()
        assert len(record["cells"]["kind"]) == 3 * 7 * 5  # kinds, rates, tables


def test_the_table_is_written_from_the_committed_cells_and_shown_in_the_readme(experiment: ModuleType) -> None:
    report = experiment.report()
    assert report == (experiment.RESULTS / "summary.md").read_text(encoding="utf-8")
    assert experiment.table(experiment.read()) in (FOLDER / "README.md").read_text(encoding="utf-8")


def gains(found: dict, ours: str, other: str, column: str) -> list[float]:
    a, b = found[ours][column], found[other][column]
    return [a[seed] - b[seed] for seed in a]


def test_dcp_beats_prompts_that_do_not_know_what_is_missing(found: dict) -> None:
    """What the specification lets us assert; nothing over MMP, nothing on rows without an image."""
    assert statistics.fmean(gains(found, "dcp", "deep_prompts", "both 70")) > 0
    assert statistics.fmean(gains(found, "dcp", "deep_prompts", "complete rows")) >= 3
