"""Every training command makes a run folder and trains through the shared trainer."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from pathlib import Path

import lightning
import pytest
import torch
from polymodal import trainer
from polymodal.callbacks import Checkpoints, DataPosition, MetricRows, NonFiniteGuard
from polymodal.run import Run, read_manifest
from polymodal.task import TaskModule

PACKAGES = ("polymodal-fedcore", "polymodal-vlm-accel", "polymodal-slt", "polymodal-css", "polymodal-missing-modal")
SHARED = {Checkpoints, DataPosition, MetricRows, NonFiniteGuard}


def training_commands() -> dict[str, str]:
    """Command -> ``module:function``, of all packages."""
    points = [p for name in PACKAGES for p in importlib.metadata.distribution(name).entry_points]
    return {p.name: p.value for p in points if p.group == "console_scripts" and p.name.endswith("-train")}


def test_there_is_a_training_command() -> None:
    assert {"slt-train", "css-train", "fed-train", "mm-train"} <= set(training_commands())


@pytest.mark.parametrize("command", training_commands())
def test_goes_through_run_and_trainer(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))  # put back after the command
    monkeypatch.delenv("POLYMODAL_SHARED_RUN", raising=False)
    runs: list[Run] = []
    built: list[lightning.Trainer] = []
    fitted: list[tuple[lightning.Trainer, lightning.LightningModule]] = []
    start, build, fit = Run.start.__func__, trainer.build_trainer, lightning.Trainer.fit

    def spied_start(cls, *arguments, **options):
        runs.append(start(cls, *arguments, **options))
        return runs[-1]

    def spied_build(config, run, *arguments, **options):
        assert run is runs[-1], "the trainer is built for the run that was started"
        built.append(build(config, run, *arguments, **options))
        return built[-1]

    def spied_fit(self, model, *arguments, **options):
        fitted.append((self, model))
        return fit(self, model, *arguments, **options)

    monkeypatch.setattr(Run, "start", classmethod(spied_start))
    monkeypatch.setattr(trainer, "build_trainer", spied_build)
    monkeypatch.setattr(lightning.Trainer, "fit", spied_fit)
    module, _, function = training_commands()[command].partition(":")
    options = [
        "--config",
        "smoke",
        "--out",
        str(tmp_path / "runs"),
        "--log.wandb",
        "off",
        "--trainer.log_every_steps",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", [command, *options])
    threads = torch.get_num_threads()
    code = getattr(importlib.import_module(module), function)()
    torch.set_num_threads(threads)
    assert code == 0
    assert len(runs) == 1, "one command, one run folder"
    assert read_manifest(runs[0].folder)["status"] == "finished"
    assert read_manifest(runs[0].folder)["command"][0] == command
    through = [(t, model) for t, model in fitted if any(t is b for b in built)]
    assert through, "nothing was fitted by a trainer of build_trainer"
    for used, model in through:
        assert isinstance(model, TaskModule)
        assert {type(c) for c in used.callbacks} >= SHARED
    # A package may train probes beside its model (slt's question-only one); they leave the run's files alone.
    for other, _ in ((t, m) for t, m in fitted if not any(t is b for b in built)):
        assert not other.loggers
        assert not other.checkpoint_callbacks
    rows = (runs[0].folder / "metrics.csv").read_text().splitlines()
    assert sum(",train/loss," in row for row in rows) == sum(t.global_step for t, _ in through)
