"""The specification's small experiment, trained here: what the pattern is worth to prompts (slow)."""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
from pathlib import Path

import pytest
from missing_modal import matrix_command

SCRIPT = Path(__file__).parents[2] / "experiments" / "world.py"


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.is_file(), reason="experiments are not part of the installed package")
def test_dcp_over_agnostic_prompts_three_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DCP 8: mean of three seeds, above agnostic prompts at 70 % both, by 3 points or more on complete rows."""
    spec = importlib.util.spec_from_file_location("world_experiment_slow", SCRIPT)
    experiment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    monkeypatch.delenv("POLYMODAL_SHARED_RUN", raising=False)
    grid = ["--methods", "dcp", "deep_prompts", "--train_kinds", "both", "--seeds", "0", "1", "2"]
    results = tmp_path / "world"
    monkeypatch.setattr(sys, "argv", ["mm-matrix", *grid, "--results", str(results), "--trainer.progress", "none"])
    assert matrix_command.main() == 0
    found = experiment.read(results)
    for column, least in {"both 70": 0.0, "complete rows": 3.0}.items():
        ours, other = found["dcp"][column], found["deep_prompts"][column]
        assert statistics.fmean(ours[seed] - other[seed] for seed in (0, 1, 2)) > least, column
