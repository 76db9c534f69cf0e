"""Patience: training stops when nothing improves, a resumed run keeps counting, and what was complete stays so."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from polymodal.callbacks import load_checkpoint
from polymodal.config import LoggingConfig, TrainerConfig
from polymodal.errors import UserError
from polymodal.run import Run
from polymodal.trainer import fit_and_test

VALUES = [0.5, 0.7, 0.6, float("nan"), 0.8, 0.8, 0.1, 0.9]
"""Improves in epochs 1, 2, 5 and 8; an equal value and NaN are no improvement."""


@pytest.fixture(autouse=True)
def _same_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("POLYMODAL_SHARED_RUN", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def train(toy, tmp_path: Path) -> Callable[..., Run]:
    """Train the toy task with scripted validation values; ``stop_at``: the process ends after so many epochs."""

    def call(*, monitor: str | None = "val/accuracy", resume: Path | None = None, stop_at: int = 99, **options) -> Run:
        trainer = TrainerConfig(**{"max_epochs": 8, "progress": "none", "checkpoint_every_minutes": 0, **options})
        config = toy.ToyConfig(
            out=tmp_path / "runs", log=LoggingConfig(wandb="off"), trainer=trainer, resume=resume and str(resume)
        )
        module, data = toy.build(config)
        module.metrics = lambda records: {"accuracy": VALUES[min(module.current_epoch, 7)]}

        def end() -> None:
            if module.current_epoch == stop_at:
                raise KeyboardInterrupt

        module.on_train_epoch_start = end
        with Run.start("toy", config, name="toy", data={"name": "toy", "fingerprint": "x"}) as run:
            run.finish(fit_and_test(module, data, trainer, run, monitor=monitor))
        return run

    return call


def epochs(run: Run) -> int:
    with (run.folder / "metrics.csv").open() as handle:
        return len([row for row in csv.reader(handle) if row[2] == "val/accuracy"])


@pytest.mark.parametrize(("patience", "ends"), [(0, 8), (1, 3), (2, 4), (3, 8)])
def test_training_stops_after_so_many_validations_without_improvement(train, patience: int, ends: int) -> None:
    run = train(patience=patience)
    assert epochs(run) == ends
    last = load_checkpoint(run.folder / "checkpoints" / "last.ckpt")
    assert last["polymodal"]["step"] == 6 * ends, "the last state is kept, whatever the cadence"
    best = load_checkpoint(run.folder / "checkpoints" / "best.ckpt")
    assert best["epoch"] == {8: 7, 3: 1, 4: 1}[ends]


def test_a_checkpoint_cadence_does_not_lose_the_end(train) -> None:
    run = train(patience=2, checkpoint_every_epochs=5)
    assert load_checkpoint(run.folder / "checkpoints" / "last.ckpt")["polymodal"]["step"] == 24


def test_a_resumed_run_keeps_counting(train, tmp_path: Path) -> None:
    whole = train(patience=2)
    from polymodal.cli import Interrupted

    with pytest.raises(Interrupted):
        train(patience=2, stop_at=3)
    (stopped,) = [f for f in (tmp_path / "runs" / "toy").iterdir() if f != whole.folder]
    again = train(patience=2, resume=stopped)
    assert epochs(again) == epochs(whole) == 4
    assert again.manifest["metrics"] == whole.manifest["metrics"]


def test_a_run_that_had_stopped_early_is_complete(train) -> None:
    run = train(patience=2)
    weights = load_checkpoint(run.folder / "checkpoints" / "last.ckpt")["state_dict"]
    again = train(patience=2, resume=run.folder)
    assert epochs(again) == 4, "no epoch more"
    after = load_checkpoint(run.folder / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.equal(weights[name], after[name]) for name in weights)


def test_patience_needs_something_to_watch(train) -> None:
    with pytest.raises(UserError, match="patience=2: nothing is monitored"):
        train(patience=2, monitor=None)
    with pytest.raises(UserError, match=r"trainer\.patience=-1; expected 0"):
        train(patience=-1)
