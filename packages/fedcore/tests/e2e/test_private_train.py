"""``fed-train`` with client-level privacy: the report, the gate, the budget, resuming, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
from fedcore.algorithms import ALGORITHMS
from fedcore.privacy import Ledger, epsilon
from polymodal.callbacks import load_checkpoint
from polymodal.testing import curve, manifest, metric_rows

TINY = ["--config", "dp_digits", "--rounds", "3", "--model.options", "{hidden: [8]}", "--federation.max_steps", "2"]
TINY += ["--engine", "serial"]
UNSEEN = ("train/loss", "train/clients", "train/local_steps", "comm/", "client/", "landscape/", "perf/", "unsafe/")


def report(folder: Path) -> dict:
    return json.loads((folder / "privacy.json").read_text())


# ------------------------------------------------------------------ report and gate


def test_the_report_stands_beside_every_result(fed_train, only_run) -> None:
    result = fed_train(*TINY)
    assert result.code == 0, result.err
    folder, facts = only_run(), manifest(only_run())
    expected = epsilon(0.2, 0.8, 3, 1e-3)
    for found in (report(folder), facts["privacy"]):
        assert found["epsilon"] == pytest.approx(expected)
        assert found["epsilon_rdp"] > found["epsilon"]
        named = {
            "delta": 1e-3,
            "noise_multiplier": 0.8,
            "clip": 0.4,
            "sampling_rate": 0.2,
            "clients": 100,
            "releases": 3,
        }
        assert {name: found[name] for name in named} == pytest.approx(named)
        assert found["adjacency"] == "add or remove one client"
        assert (found["accountant"], found["sampling"]) == ("PLD", "poisson")
        assert not found["reasons"]
        assert found["unaccounted"]
    assert (facts["metrics"]["privacy/epsilon"], facts["metrics"]["privacy/delta"]) == pytest.approx((expected, 1e-3))
    assert facts["metric_signatures"].keys() == facts["metrics"].keys()
    after = result.out[result.out.index("accuracy (test)") :]
    assert f"epsilon = {expected:.4g} at delta = 0.001" in after
    steps, spent = zip(*curve(folder, "privacy/epsilon"), strict=True)
    assert steps == (1, 2, 3)
    assert list(spent) == sorted(spent)
    assert spent[-1] == pytest.approx(expected, rel=2e-3)
    assert [value for _, value in curve(folder, "privacy/delta")] == pytest.approx([1e-3] * 3)
    assert len(Ledger(folder / "privacy_ledger.jsonl")) == 3


def test_nothing_that_clients_data_made_is_written(fed_train, only_run) -> None:
    result = fed_train(*TINY)
    assert result.code == 0, result.err
    folder = only_run()
    names = {row["name"] for row in metric_rows(folder)}
    assert {"test/accuracy", "val/accuracy", "train/lr", "privacy/epsilon"} <= names
    assert not [name for name in {*names, *manifest(folder)["metrics"]} if name.startswith(UNSEEN)]
    assert not (folder / "samples").exists()
    assert {path.name for path in (folder / "figures").iterdir()} == {"accuracy.png", "loss.png"}
    for word in ("loss", "local steps", "clients dropped", "bytes", "by client", "Hessian"):
        assert word not in result.out.partition("privacy ")[0].replace("loss (val)", "").replace("loss (test)", "")
    kept = load_checkpoint(folder / "checkpoints" / "last.ckpt")["fedcore"]
    assert not any(kept["totals"].values())


def test_unsafe_metrics_cost_the_guarantee(fed_train, only_run) -> None:
    result = fed_train(*TINY, "--privacy.unsafe_debug_metrics", "true")
    assert result.code == 0, result.err
    assert "epsilon is infinite: unsafe_debug_metrics" in result.err
    assert "UNSAFE" in result.out
    folder = only_run()
    names = {row["name"] for row in metric_rows(folder)}
    assert {"train/loss", "train/clients", "comm/up_bytes", "unsafe/clipped"} <= names
    assert (report(folder)["epsilon"], report(folder)["unsafe_metrics"]) == ("inf", True)
    assert math.isinf(manifest(folder)["metrics"]["privacy/epsilon"])
    assert (folder / "figures" / "labels.png").exists()
    assert "client/accuracy_min" in manifest(folder)["metrics"]


@pytest.mark.slow
def test_wandb_is_behind_the_same_gate(tmp_path, monkeypatch) -> None:
    """What reaches W&B's own function."""
    import sys

    from fedcore import train
    from polymodal import logs

    seen: set[str] = set()
    log = logs.WandbLog.log_metrics
    monkeypatch.setattr(
        logs.WandbLog, "log_metrics", lambda self, m, step=None: (seen.update(m), log(self, m, step))[1]
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fed-train", *TINY, "--log.wandb", "offline", "--trainer.progress", "none"])
    assert train.main() == 0
    assert "privacy/epsilon" in seen
    assert not [name for name in seen if name.startswith(UNSEEN)]


# ------------------------------------------------------------------ methods and options

METHODS = [row.name for row in ALGORITHMS if "dp" in row.tags]


@pytest.mark.parametrize("name", [n if n == "dp_blur" else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_every_private_algorithm_trains_from_end_to_end(fed_train, only_run, name: str) -> None:
    """With the clip that the preset has for it; each round is one event."""
    result = fed_train(*TINY, "--algorithm", name, "--rounds", "2")
    assert result.code == 0, result.err
    facts = manifest(only_run())
    assert (facts["status"], facts["method"], facts["privacy"]["releases"]) == ("finished", name, 2)
    assert facts["privacy"]["epsilon"] == pytest.approx(epsilon(0.2, 0.8, 2, 1e-3))
    kept = load_checkpoint(only_run() / "checkpoints" / "last.ckpt")["fedcore"]["client_states"]["shard_of"]
    assert bool(kept) == ALGORITHMS.load(name).keeps_state


@pytest.mark.slow
@pytest.mark.parametrize("classes", [10, 100])
def test_published_settings_take_two_steps_at_full_size(fed_train, only_run, tmp_path, monkeypatch, classes) -> None:
    """Full-size model, official files with few pictures, two clients of a hundred, one step each."""
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    path = Path(__file__).parents[1] / "_data_layouts.py"
    spec = importlib.util.spec_from_file_location("fed_private_layouts", path)
    layouts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layouts)
    written = layouts.cifar10(tmp_path / "files", each=40) if classes == 10 else layouts.cifar100(tmp_path / "files")
    root = written[0] if isinstance(written, tuple) else written
    few = [
        "--rounds",
        "1",
        "--clients",
        "100",
        "--fraction",
        "0.02",
        "--federation.max_steps",
        "1",
        "--partition.refill",
        "true",
    ]
    few += ["--privacy.sampling", "fixed", "--engine", "serial"]
    result = fed_train("--config", f"dp_fedpgn_cifar{classes}", "--data.root", root, *few)
    assert result.code == 0, result.err
    assert report(only_run())["clients"] == 100
    assert 4_800_000 < Ledger(only_run() / "privacy_ledger.jsonl").events[0].numbers < 5_100_000


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["pool", "batched"])
def test_other_engines_train_privately(fed_train, only_run, engine: str) -> None:
    result = fed_train(*TINY, "--engine", engine, "--federation.workers", "2")
    assert result.code == 0, result.err
    assert report(only_run())["releases"] == 3


def test_methods_have_their_own_clip_and_the_default_preset_is_private(fed_train) -> None:
    for options, said in (
        (["--algorithm", "dp_fedavg"], "sigma 0.8, C 1,"),
        (["--algorithm=dp_fedpgn"], "sigma 0.8, C 0.4,"),
        (["--algorithm", "dp_fedpgn", "--privacy.clip", "0.2", "--privacy.noise_multiplier", "2"], "sigma 2, C 0.2,"),
        (["--config", "dp_digits", "--privacy.sampling", "fixed"], "fixed cohorts of 20 expected"),
    ):
        result = fed_train(*options, "--dry_run", "true")
        assert result.code == 0, result.err
        assert said in result.out, result.out


def test_a_target_chooses_the_noise(fed_train, only_run) -> None:
    result = fed_train(*TINY, "--privacy.target_epsilon", "1.5")
    assert result.code == 0, result.err
    assert 1.49 < report(only_run())["epsilon"] <= 1.5
    assert report(only_run())["noise_multiplier"] > 0.8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--algorithm", "dp_fedpgn", "--privacy.clip", "2"], "not scaled with gamma"),
        (["--privacy.delta", "0.01"], "not below 1/N"),
        (["--algorithm", "fedavg", "--privacy.clip", "1"], "fedavg is not private"),
    ],
)
def test_doubtful_options_are_warned_of(fed_train, options: list[str], said: str) -> None:
    result = fed_train(*TINY, *options, "--dry_run", "true")
    assert result.code == 0, result.err
    assert said in result.err


NORMED = '''
import torch
from torch import nn


class Normed(nn.Sequential):
    """BatchNorm keeps statistics of the clients' data."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
'''


def test_what_no_guarantee_goes_with_is_refused_in_one_line(fed_train, complains, tmp_path) -> None:
    (tmp_path / "normed.py").write_text(NORMED)
    unequal = ["--federation.exact_steps", "false", "--partition", "dirichlet_label", "--federation.max_steps", "0"]
    for options, parts in (
        (["--module", f"{tmp_path / 'normed.py'}:Normed"], ("BatchNorm1d", "GroupNorm")),
        (["--federation.weighting", "samples"], ("weighting=samples", "uniform")),
        (["--config", "digits", "--algorithm", "dp_fedavg", "--privacy.noise_multiplier", "1"], ("privacy.clip",)),
        (["--config", "digits", "--algorithm", "dp_fedavg", "--privacy.clip", "1"], ("noise_multiplier",)),
        (unequal, ("local steps", "exact_steps")),
        (["--privacy.noise_location", "client"], ("sampling=fixed",)),
        (["--privacy.delta", "1.5"], ("privacy.delta=1.5",)),
        (["--algorithm_options.gamma", "0"], ("gamma=0",)),
    ):
        complains(fed_train(*TINY, *options), *parts)
    assert not (tmp_path / "runs").exists()


def test_presets_say_which_option_of_privacy_is_none(fed_train, complains, tmp_path) -> None:
    (tmp_path / "own.yaml").write_text(
        "algorithm: dp_fedavg\ndefaults_by_algorithm: {dp_fedavg: {privacy.clop: 1.0}}\n"
    )
    complains(fed_train("--config", tmp_path / "own.yaml"), "no option privacy.clop")


# ------------------------------------------------------------------ budget and resuming


def test_a_spent_budget_ends_the_run_before_the_round_that_exceeds_it(fed_train, only_run, complains) -> None:
    budget = epsilon(0.2, 0.8, 2, 1e-3) * 1.001
    options = [*TINY, "--privacy.noise_multiplier", "0.8", "--privacy.target_epsilon", budget]
    line = complains(fed_train(*options, "--trainer.checkpoint_every_epochs", "2"), "privacy budget", "last checkpoint")
    folder = only_run()
    assert manifest(folder)["status"] == "failed"
    assert f"{epsilon(0.2, 0.8, 2, 1e-3):.4g}" in line
    assert report(folder)["releases"] == 2
    assert report(folder)["epsilon"] <= budget
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 2
    complains(fed_train("--resume", folder), "privacy budget")  # spent before the first round of what is left
    assert len(Ledger(folder / "privacy_ledger.jsonl")) == 2
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_a_resumed_run_goes_on_with_its_ledger_and_other_noise(fed_train, only_run) -> None:
    result = fed_train(*TINY, "--rounds", "2")
    assert result.code == 0, result.err
    folder = only_run()
    before = report(folder)["epsilon"]
    first = load_checkpoint(folder / "checkpoints" / "last.ckpt")["fedcore"]["simulation"]["flat"]
    result = fed_train("--resume", folder, "--rounds", "4", "--privacy.noise_multiplier", "1.5")
    assert result.code == 0, result.err
    found = report(folder)
    assert found["releases"] == 4
    assert found["noise_multipliers"] == [0.8, 1.5]
    assert before < found["epsilon"] < epsilon(0.2, 0.8, 4, 1e-3)
    assert [step for step, _ in curve(folder, "privacy/epsilon")] == [1, 2, 3, 4]
    again = load_checkpoint(folder / "checkpoints" / "last.ckpt")["fedcore"]["simulation"]["flat"]
    assert not torch.equal(first, again)


def test_the_noise_does_not_come_from_the_seed(fed_train, tmp_path) -> None:
    ends = []
    for number in range(2):
        result = fed_train(*TINY, "--rounds", "1", "--seed", "5", "--out", tmp_path / str(number))
        assert result.code == 0, result.err
        (folder,) = (tmp_path / str(number) / "fedcore").iterdir()
        ends.append(load_checkpoint(folder / "checkpoints" / "last.ckpt")["fedcore"]["simulation"]["flat"])
    assert not torch.equal(*ends)
    assert bool((ends[0] != ends[1]).float().mean() > 0.99)


@pytest.mark.parametrize("name", ["dp_fedpgn", pytest.param("dp_scaffold", marks=pytest.mark.slow)])
def test_resume_is_exact_under_the_test_switch(fed_train, tmp_path, name: str) -> None:
    """Bit for bit: weights, states, metrics. The switch makes epsilon infinite."""
    options = [*TINY, "--algorithm", name, "--privacy.deterministic_noise_for_tests", "true"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = fed_train(*options, "--out", whole)
    assert result.code == 0, result.err
    assert "NO PRIVACY" in result.out
    assert fed_train(*options, "--rounds", "1", "--out", parts).code == 0
    (one,), (two,) = (whole / "fedcore").iterdir(), (parts / "fedcore").iterdir()
    result = fed_train("--resume", two, "--rounds", "3", "--out", parts)
    assert result.code == 0, result.err
    for folder in (one, two):
        assert report(folder)["epsilon"] == "inf"
        assert report(folder)["releases"] == 3
    left, right = (load_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (one, two))
    for tree in ("server", "buffers"):
        a, b = (each["fedcore"]["simulation"][tree] for each in (left, right))
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert torch.equal(*(each["fedcore"]["simulation"]["flat"] for each in (left, right)))
    assert manifest(one)["metrics"] == manifest(two)["metrics"]
    seen = [[row for row in metric_rows(folder) if not row["name"].startswith("perf/")] for folder in (one, two)]
    assert seen[0] == seen[1]


def test_an_interrupted_report_does_not_stay(fed_train, only_run, monkeypatch) -> None:
    """A run that is killed after it was resumed must not keep the report of before."""
    from fedcore import private_run

    assert fed_train(*TINY, "--rounds", "1").code == 0
    folder = only_run()
    assert (folder / "privacy.json").exists()
    monkeypatch.setattr("fedcore.job.Job.finish", lambda *arguments: {})
    monkeypatch.setattr(private_run, "write_report", lambda *arguments: None)
    fed_train("--resume", folder, "--rounds", "2")
    assert not (folder / "privacy.json").exists()
    assert len(Ledger(folder / "privacy_ledger.jsonl")) == 2


def test_a_ledger_that_was_tampered_with_ends_the_run(fed_train, only_run, complains) -> None:
    assert fed_train(*TINY, "--rounds", "1").code == 0
    path = only_run() / "privacy_ledger.jsonl"
    path.write_text(re.sub(r'"noise_multiplier": 0.8', '"noise_multiplier": -1', path.read_text()))
    complains(fed_train("--resume", only_run(), "--rounds", "2"), "ledger", "damaged")
