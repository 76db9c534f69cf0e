"""What the shared trainer writes: metric rows with sane values, checkpoints of the right cadence, honest failures."""

from __future__ import annotations

import csv
import dataclasses
import errno
import fnmatch
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
import torch
from polymodal import trainer as trainer_module
from polymodal.callbacks import Checkpoints, PlainProgress, load_checkpoint
from polymodal.cli import run_guarded
from polymodal.config import LoggingConfig, TrainerConfig
from polymodal.errors import UserError
from polymodal.logs import X_AXES
from polymodal.run import Run
from polymodal.trainer import build_trainer, fit, fit_and_test, load_best, resume_checkpoint, stage_of_checkpoint

PERF = {"perf/step_ms", "perf/samples_per_s", "perf/data_wait", "perf/peak_mib"}


@pytest.fixture(autouse=True)
def _same_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("POLYMODAL_SHARED_RUN", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def train(toy, tmp_path: Path) -> Callable[..., Run]:
    """Train the toy task in this process; returns the run. Keywords: trainer options, ``slow`` seconds a sample."""

    def call(*callbacks, task="toy", monitor="val/accuracy", mode="max", slow=0.0, change=None, **options) -> Run:
        trainer = TrainerConfig(**{"max_epochs": 2, "log_every_steps": 2, "progress": "none", **options})
        config = toy.ToyConfig(out=tmp_path / "runs", log=LoggingConfig(wandb="off"), trainer=trainer)
        module, data = toy.build(config)
        if slow:
            fetch = type(data.train).__getitem__
            type(data.train).__getitem__ = lambda self, key: (time.sleep(slow), fetch(self, key))[1]
        if change:
            change(module)
        with Run.start(task, config, name="toy", data={"name": "toy", "fingerprint": "x"}) as run:
            run.finish(fit_and_test(module, data, trainer, run, callbacks, monitor=monitor, mode=mode))
        return run

    return call


def read(folder: Path) -> list[list[str]]:
    with (folder / "metrics.csv").open() as handle:
        return list(csv.reader(handle))[1:]


def rows(run: Run) -> list[tuple[int, str, str, float]]:
    return [(int(step), epoch, name, float(value)) for step, epoch, name, value in read(run.folder)]


def column(run: Run, name: str) -> list[float]:
    return [value for _, _, found, value in rows(run) if found == name]


# ------------------------------------------------------------------ metric rows


def test_names_steps_and_axes(train) -> None:
    run = train()
    names = {name for _, _, name, _ in rows(run)}
    assert names == {"train/loss", "train/lr", "val/accuracy", "test/accuracy"} | PERF
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in X_AXES) for name in names)
    # 48 samples in batches of 8: 6 steps an epoch.
    assert [r[:2] for r in rows(run) if r[2] == "train/loss"] == [(s, str((s - 1) // 6)) for s in range(2, 13, 2)]
    assert [r[:2] for r in rows(run) if r[2] == "val/accuracy"] == [(6, "0"), (12, "1")]
    assert [r[:2] for r in rows(run) if r[2] == "test/accuracy"] == [(12, "")]
    assert run.manifest["metrics"] == {"test/accuracy": column(run, "test/accuracy")[0]}


class Says(L.Callback):
    """Changes what the module says of its steps and validations, before the shared callbacks read it."""

    def on_train_batch_end(self, trainer, pl_module, *arguments) -> None:
        pl_module.train_logs |= {"aux": torch.tensor(0.5), "comm/up_bytes": torch.tensor(8.0)}

    def on_validation_end(self, trainer, pl_module) -> None:
        if pl_module.current_epoch == 0:
            pl_module.last_metrics = {}


def test_names_with_a_slash_are_full_names_and_a_validation_may_be_left_out(train) -> None:
    run = train(Says())
    names = {name for _, _, name, _ in rows(run)}
    assert {"train/aux", "comm/up_bytes"} <= names
    assert [r[:2] for r in rows(run) if r[2] == "val/accuracy"] == [(12, "1")]


class Tests(L.Callback):
    """Validations measure the test split too."""

    def on_fit_start(self, trainer, pl_module) -> None:
        pl_module.tested_step = -1

    def on_validation_end(self, trainer, pl_module) -> None:
        pl_module.last_metrics["test/accuracy"] = 0.3
        pl_module.tested_step = trainer.global_step


def test_a_test_that_the_last_validation_wrote_is_not_written_again(train) -> None:
    run = train(Tests())
    assert [(r[0], r[3]) for r in rows(run) if r[2] == "test/accuracy"] == [(6, 0.3), (12, 0.3)]
    assert run.manifest["metrics"]["test/accuracy"] != 0.3


def test_throughput_is_sane(train) -> None:
    run = train()
    for step_ms, rate, wait, peak in zip(*(column(run, name) for name in sorted(PERF, key=order)), strict=True):
        assert 0 < step_ms < 60_000
        assert rate == pytest.approx(8 * 1000 / step_ms, rel=1e-6), "8 samples a step"
        assert 0 <= wait <= 1
        assert 20 < peak < 100_000


def order(name: str) -> int:
    return ["perf/step_ms", "perf/samples_per_s", "perf/data_wait", "perf/peak_mib"].index(name)


def test_a_slow_loader_shows_as_waiting_for_data(train) -> None:
    run = train(slow=0.01, max_epochs=1)  # 80 ms a batch
    assert min(column(run, "perf/data_wait")) > 0.5
    assert min(column(run, "perf/step_ms")) > 80


def test_accumulated_batches_are_one_step(train) -> None:
    run = train(accumulate=3, log_every_steps=1)
    assert [r[0] for r in rows(run) if r[2] == "train/loss"] == [1, 2, 3, 4]
    step_ms, rate = column(run, "perf/step_ms"), column(run, "perf/samples_per_s")
    assert all(r == pytest.approx(8 * 1000 / s, rel=1e-6) for s, r in zip(step_ms, rate, strict=True))


# ------------------------------------------------------------------ checkpoints


class Writes:
    """Counts and names what is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        original = torch.save

        def save(value, handle, *rest, **options):
            self.names.append(Path(handle.name).name.split(".ckpt")[0].lstrip("."))
            return original(value, handle, *rest, **options)

        monkeypatch.setattr(torch, "save", save)


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({}, 4),
        ({"checkpoint_every_epochs": 2}, 2),
        ({"checkpoint_every_epochs": 3}, 2),
        ({"checkpoint_every_epochs": 0}, 1),
        ({"checkpoint_every_epochs": 0, "checkpoint_every_steps": 4}, 6),
        ({"checkpoint_every_epochs": 0, "checkpoint_every_minutes": 1e-9}, 24),
        ({"max_steps": 9}, 2),
    ],
)
def test_cadence(train, monkeypatch: pytest.MonkeyPatch, options, last: int) -> None:
    # 4 epochs of 6 steps. Every 4 steps: 4, 8, 16, 20 (12 and 24 end an epoch) and the end; by time, after each of 24
    # steps, at the end of an epoch after its validation.
    writes = Writes(monkeypatch)
    run = train(**{"max_epochs": 4, **options})
    expected = {6: 5}.get(last, last)
    assert writes.names.count("last") == expected
    checkpoint = load_checkpoint(run.folder / "checkpoints" / "last.ckpt")
    assert checkpoint["polymodal"] == {
        "schema_version": 1,
        "task": "toy",
        "stage": 0,
        "step": min(24, options.get("max_steps", 24)),
    }


@pytest.mark.parametrize(("mode", "best"), [("max", 1), ("min", 2)])
def test_best_is_kept_and_tested(train, mode: str, best: int) -> None:
    values = iter([0.5, 0.9, 0.1, 0.7])
    seen = []

    def change(module) -> None:
        module.metrics = lambda records: {"accuracy": next(values, float(module.net[0].weight.sum()))}
        module.on_validation_end = lambda: seen.append(float(module.net[0].weight.sum()))

    run = train(max_epochs=4, mode=mode, change=change)
    checkpoint = load_checkpoint(run.folder / "checkpoints" / "best.ckpt")
    assert float(checkpoint["state_dict"]["net.0.weight"].sum()) == seen[best]
    assert run.manifest["metrics"]["test/accuracy"] == seen[best], "the test is of the best weights"
    assert "optimizer_states" not in checkpoint


def test_nan_is_never_the_best(train) -> None:
    values = iter([float("nan"), 0.2, 0.1])

    def change(module) -> None:
        module.metrics = lambda records: {"accuracy": next(values, 0.0)}

    run = train(max_epochs=3, change=change)
    state = load_checkpoint(run.folder / "checkpoints" / "last.ckpt")["callbacks"]
    assert [s for name, s in state.items() if "Checkpoints" in name] == [{"best": 0.2, "best_epoch": 1, "stale": 1}]


def test_without_a_monitor_the_last_weights_are_tested(train) -> None:
    run = train(monitor=None)
    assert {p.name for p in (run.folder / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_an_unknown_monitor_is_named(train) -> None:
    with pytest.raises(UserError, match="monitor 'val/bleu4' is not a validation metric; there are: val/accuracy"):
        train(monitor="val/bleu4")


def test_a_disk_that_fills_up_leaves_the_older_checkpoint(toy_run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, whole, error = toy_run(out="whole")
    assert code == 0, error
    original, count = torch.save, [0]

    def full(value, handle, *rest, **options):
        count[0] += 1
        if count[0] == 5:
            handle.write(b"PK half a checkpoint")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(value, handle, *rest, **options)

    monkeypatch.setattr(torch, "save", full)
    code, folder, error = toy_run(out="full")
    assert code == 2
    assert error.count("\n") == 1
    assert "disk full while writing" in error
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert "disk full" in manifest["error"]
    steps = {p.name: load_checkpoint(p)["polymodal"]["step"] for p in (folder / "checkpoints").glob("*.ckpt")}
    assert steps["last.ckpt"] == 6, "the write that failed was of step 8"
    monkeypatch.undo()
    code, _, error = toy_run("--resume", folder, out="full")
    assert code == 0, error
    final = [load_checkpoint(f / "checkpoints" / "last.ckpt")["state_dict"] for f in (whole, folder)]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


@pytest.mark.parametrize("batch", [5, 8, 9, 11, 17, 20])
def test_killed_in_the_middle_of_an_accumulation(toy, toy_run, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    # 10 batches an epoch, 3 a step: steps after 3, 6, 9, 10. A checkpoint after every step and never in between.
    options = ["--samples", 80, "--trainer.accumulate", 3, "--trainer.checkpoint_every_minutes", 1e-9]
    options += ["--trainer.max_epochs", 2]
    code, whole, error = toy_run(*options, out="whole")
    assert code == 0, error
    build = toy.build

    def killing(config):
        module, data = build(config)
        loss, calls = module.loss, [0]

        def counted(batch_, generator):
            calls[0] += 1
            if calls[0] == batch:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(batch_, generator)

        module.loss = counted
        return module, data

    monkeypatch.setattr(toy, "build", killing)
    code, folder, _ = toy_run(*options, out="killed")
    assert code == -9
    monkeypatch.setattr(toy, "build", build)
    code, _, error = toy_run(*options, "--resume", folder, out="killed")
    assert code == 0, error
    kept = [[r for r in read(f) if not r[2].startswith("perf/")] for f in (whole, folder)]
    assert kept[0] == kept[1]
    final = [load_checkpoint(f / "checkpoints" / "last.ckpt")["state_dict"] for f in (whole, folder)]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_each_stage_keeps_its_best_weights(toy, train, tmp_path: Path) -> None:
    trainer = TrainerConfig(max_epochs=1, progress="none")
    config = toy.ToyConfig(out=tmp_path / "two", log=LoggingConfig(wandb="off"), trainer=trainer)
    with Run.start("toy", config, name="toy") as run:
        first, data = toy.build(config)
        fit(first, data, trainer, run, monitor="val/accuracy", stage=1)
        folder = run.folder / "checkpoints"
        second, other = toy.build(dataclasses.replace(config, seed=1))
        load_best(second, run, stage=2)
        assert not torch.equal(second.net[0].weight, first.net[0].weight), "there is no best of stage 2 yet"
        fit(second, other, trainer, run, monitor="val/accuracy", stage=2)
    marks = {p.name: load_checkpoint(p)["polymodal"]["stage"] for p in folder.iterdir()}
    assert marks == {"best.ckpt": 2, "last.ckpt": 2, "previous.ckpt": 1, "stage1.ckpt": 1}
    found, _ = toy.build(dataclasses.replace(config, seed=2))
    for stage, module in ((1, first), (2, second)):
        load_best(found, run, stage=stage)
        assert torch.equal(found.net[0].weight, module.net[0].weight)


def test_without_hard_links_checkpoints_are_copied(train, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    run = train()
    steps = {p.name: load_checkpoint(p)["polymodal"]["step"] for p in (run.folder / "checkpoints").iterdir()}
    assert (steps["previous.ckpt"], steps["last.ckpt"]) == (6, 12)


# ------------------------------------------------------------------ what is read back


@pytest.fixture
def trained(train) -> Run:
    return train(max_epochs=1)


def rewrite(path: Path, **marks: object) -> None:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["polymodal"] |= marks
    torch.save(checkpoint, path)


def continued(run: Run, name: str = "last") -> Run:
    """The run as ``Run.start`` reopens it: with a checkpoint that nobody has read yet."""
    run.checkpoint, run.checkpoint_marks = run.folder / "checkpoints" / f"{name}.ckpt", None
    return run


def test_checkpoints_that_cannot_be_used(trained: Run, tmp_path: Path) -> None:
    path = trained.folder / "checkpoints" / "last.ckpt"
    rewrite(path, schema_version=2)
    with pytest.raises(UserError, match="schema version 2 is newer than this polymodal reads"):
        load_checkpoint(path)
    rewrite(path, schema_version=1, task="css")
    with pytest.raises(UserError, match="is of task 'css', not 'toy'"):
        resume_checkpoint(continued(trained))
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="has no state_dict"):
        load_checkpoint(path)
    torch.save({"state_dict": {}, "x": LoggingConfig()}, path)
    with pytest.raises(UserError, match="could run code"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "none.ckpt").write_text("text")
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(tmp_path / "none.ckpt")


def test_stages(trained: Run) -> None:
    assert stage_of_checkpoint(continued(trained)) == 0
    rewrite(trained.folder / "checkpoints" / "last.ckpt", stage=2)
    assert stage_of_checkpoint(continued(trained)) == 2
    assert resume_checkpoint(continued(trained), stage=2) == trained.folder / "checkpoints" / "last.ckpt"
    assert resume_checkpoint(continued(trained), stage=1) is None
    trained.checkpoint = None
    assert stage_of_checkpoint(trained) is None
    assert resume_checkpoint(trained) is None


def test_the_checkpoint_to_resume_from_is_read_once(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    monkeypatch.setattr(trainer_module, "load_checkpoint", lambda path: reads.append(path) or load_checkpoint(path))
    run = continued(trained)
    for _ in range(3):
        assert stage_of_checkpoint(run) == 0
        assert resume_checkpoint(run) == run.checkpoint
    assert len(reads) == 1


def test_a_named_checkpoint_does_not_fall_back(trained: Run) -> None:
    (trained.folder / "checkpoints" / "best.ckpt").write_text("text")
    with pytest.raises(UserError, match="is damaged"):
        resume_checkpoint(continued(trained, "best"))


def test_load_best_without_one_changes_nothing(toy, train) -> None:
    run = train(monitor=None, max_epochs=1)
    module, _ = toy.build(toy.ToyConfig())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    load_best(module, run)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# ------------------------------------------------------------------ the trainer


def test_options_that_do_not_fit(trained: Run) -> None:
    config = TrainerConfig(progress="none")
    with pytest.raises(UserError, match="trainer.extra: .*no_such_option"):
        build_trainer(dataclasses.replace(config, extra={"no_such_option": 1}), trained)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--trainer.accelerator gpu: torch finds no GPU here; use cpu or auto"):
            build_trainer(dataclasses.replace(config, accelerator="gpu"), trained)


def test_extra_options_reach_lightning_and_a_package_brings_callbacks(train) -> None:
    import lightning as L

    class Own(L.Callback):
        seen: ClassVar[list[int]] = []

        def on_train_batch_end(self, trainer, *rest) -> None:
            self.seen.append(trainer.global_step)

    run = train(Own(), extra={"limit_train_batches": 2}, max_epochs=1, log_every_steps=1)
    assert Own.seen == [1, 2]
    assert max(r[0] for r in rows(run)) == 2


def test_progress_without_a_terminal_is_a_line_an_epoch(train, capsys: pytest.CaptureFixture[str]) -> None:
    train(progress="auto")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/2 · loss ")
    assert "val/accuracy" in lines[1]
    assert lines[1].endswith("0 s left")


def test_a_training_that_is_stopped_by_steps_counts_its_epochs(train, capsys: pytest.CaptureFixture[str]) -> None:
    train(progress="plain", max_epochs=-1, max_steps=12)
    assert [line.split(" · ")[0] for line in capsys.readouterr().err.splitlines()] == ["epoch 1/2", "epoch 2/2"]


def test_errors_name_the_samples(train) -> None:
    def change(module) -> None:
        module.describe_batch = lambda batch: "sample 7"
        module.loss = lambda batch, generator: (module.net(batch[1]).sum() * float("nan"), {})

    messages: list[str] = []

    def call() -> None:
        try:
            train(change=change)
        except RuntimeError as error:
            messages.append(str(error))
            raise

    assert run_guarded(call, prog="toy") == 1
    assert messages[0].startswith("loss is nan at step 0, batch of sample 7; all parameters are finite; lower")


def test_signals_are_given_back_after_an_error(train) -> None:
    def change(module) -> None:
        module.loss = lambda batch, generator: 1 // 0

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(ZeroDivisionError):
        train(change=change)
    assert {number: signal.getsignal(number) for number in before} == before


def test_shared_callbacks_are_there(toy, trained: Run) -> None:
    trainer = build_trainer(TrainerConfig(progress="plain"), trained)
    kinds = [type(c) for c in trainer.callbacks]
    assert Checkpoints in kinds
    assert PlainProgress in kinds
    assert trainer.loggers == trained.loggers
    assert not trainer.checkpoint_callbacks, "Lightning's own checkpointing is off"
    assert callable(fit)
