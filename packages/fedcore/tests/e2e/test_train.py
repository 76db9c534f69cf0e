"""fed-train as its users call it: the smoke preset from end to end, every algorithm, what it says about itself."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import fedcore.train
import numpy as np
import pytest
import torch
from fedcore.algorithms import ALGORITHMS
from PIL import Image
from polymodal.callbacks import load_checkpoint
from polymodal.testing import curve, manifest, metric_rows, read_offline, run_script

PROGRAM = Path(sys.executable).parent / "fed-train"
TINY = ["--config", "smoke", "--rounds", "2", "--model.options", "{hidden: [4]}", "--federation.flatness", "0"]
CLIENTS, ROUNDS = 8, 4


# ------------------------------------------------------------------ the run folder


def test_a_run_leaves_what_is_promised(fed_run: Path) -> None:
    assert {path.name for path in fed_run.iterdir()} == {
        "checkpoints", "config.yaml", "figures", "manifest.json", "metrics.csv", "samples",
    }  # fmt: skip
    assert {path.name for path in (fed_run / "figures").iterdir()} == {
        "accuracy.png", "clients.png", "labels.png", "loss.png",
    }  # fmt: skip
    checkpoints = {path.name for path in (fed_run / "checkpoints").iterdir()}
    assert checkpoints == {"best.ckpt", "clients", "last.ckpt", "previous.ckpt"}


def test_the_manifest_has_the_facts_and_the_final_metrics(fed_run: Path) -> None:
    facts = manifest(fed_run)
    assert (facts["status"], facts["method"], facts["fidelity"]) == ("finished", "fedmoswa", "paper")
    assert facts["engine"] in ("serial", "pool")
    assert facts["threads"] == 1
    data = facts["data"]
    assert (data["name"], data["clients"], data["model"]) == ("digits", CLIENTS, "mlp")
    assert re.fullmatch(r"[0-9a-f]{16}", data["fingerprint"])
    assert (data["partition"]["scheme"], data["partition"]["alpha"]) == ("dirichlet_client", 0.1)
    assert re.fullmatch(r"[0-9a-f]{64}", data["partition"]["sha256"])
    assert data["val_samples"] == pytest.approx(0.1 * data["samples"]["train"], abs=10)
    metrics = facts["metrics"]
    names = {"test/accuracy", "test/loss", "val/accuracy", "test/accuracy_best", "test/accuracy_mean10"}
    names |= {"comm/up_bytes_total", "comm/down_bytes_total", "landscape/hessian", "landscape/sharpness"}
    names |= {f"client/accuracy_{name}" for name in ("min", "q10", "median", "q90", "mean")}
    assert names <= metrics.keys()
    assert facts["metric_signatures"].keys() == metrics.keys()
    assert facts["metric_signatures"]["test/accuracy"] == "last model"


def test_rows_go_by_round(fed_run: Path) -> None:
    found = metric_rows(fed_run)
    keys = [(row["step"], row["name"]) for row in found]
    assert len(keys) == len(set(keys)), "no value twice"
    every = [str(round) for round in range(1, ROUNDS + 1)]
    for name in (
        "train/loss",
        "train/lr",
        "train/clients",
        "comm/up_bytes",
        "perf/step_ms",
        "val/loss",
        "test/accuracy",
    ):
        assert [row["step"] for row in found if row["name"] == name] == every, name
    assert {row["step"] for row in found if row["name"].startswith(("client/", "landscape/"))} == {every[-1]}
    assert load_checkpoint(fed_run / "checkpoints" / "last.ckpt")["global_step"] == ROUNDS


def test_the_final_metrics_are_those_of_the_rounds(fed_run: Path) -> None:
    metrics, accuracy = manifest(fed_run)["metrics"], curve(fed_run, "test/accuracy")
    assert metrics["test/accuracy"] == accuracy[-1][1]
    assert metrics["test/accuracy_best"] == max(value for _, value in accuracy)
    assert metrics["test/accuracy_mean10"] == pytest.approx(np.mean([value for _, value in accuracy]))
    assert metrics["comm/up_bytes_total"] == sum(value for _, value in curve(fed_run, "comm/up_bytes"))
    # FedMoSWA sends weights and a control variate both ways; 64-16-10, four clients a round, four bytes a number.
    assert [value for _, value in curve(fed_run, "comm/up_bytes")] == [
        4 * 2 * (64 * 16 + 16 + 16 * 10 + 10) * 4
    ] * ROUNDS


def test_metrics_by_client_are_a_table(fed_run: Path) -> None:
    table = [json.loads(line) for line in (fed_run / "samples" / "client-metrics.jsonl").read_text().splitlines()]
    assert [row["client"] for row in table] == list(range(CLIENTS))
    accuracies = [row["accuracy"] for row in table]
    metrics = manifest(fed_run)["metrics"]
    assert metrics["client/accuracy_min"] == min(accuracies)
    assert metrics["client/accuracy_median"] == pytest.approx(np.median(accuracies))
    data = manifest(fed_run)["data"]
    assert {row["samples"] for row in table} == {(data["samples"]["train"] - data["val_samples"]) // CLIENTS}


def test_pictures_are_drawn(fed_run: Path) -> None:
    for path in (fed_run / "figures").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 100
            assert len(picture.convert("RGB").getcolors(10**7)) > 20, path.name


def test_a_stored_configuration_repeats_its_run_bit_for_bit(fed_train, fed_run: Path, only_run) -> None:
    result = fed_train("--config", fed_run, "--engine", "serial")
    assert result.code == 0, result.err
    again, before = (load_checkpoint(run / "checkpoints" / "last.ckpt") for run in (only_run(), fed_run))
    assert all(torch.equal(value, again["state_dict"][name]) for name, value in before["state_dict"].items())
    assert manifest(only_run())["metrics"] == manifest(fed_run)["metrics"]


def test_a_finished_run_is_shown_again(fed_train, fed_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fed_run, tmp_path / "runs" / "fedcore" / fed_run.name))
    result = fed_train("--resume", folder)
    assert result.code == 0, result.err
    assert "accuracy (test)" in result.out
    assert manifest(folder)["metrics"] == manifest(fed_run)["metrics"]
    assert sorted(map(str, metric_rows(folder))) == sorted(map(str, metric_rows(fed_run)))


# ------------------------------------------------------------------ the console script


@pytest.mark.slow
def test_the_console_script_logs_to_wandb_offline_with_the_round_as_axis(tmp_path: Path) -> None:
    done = run_script([PROGRAM, *TINY], tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "fedcore").iterdir()
    assert f"run folder  runs/fedcore/{folder.name}" in done.stdout
    assert "\x1b[" not in done.stdout + done.stderr, "no colours and bars where there is no terminal"
    assert re.search(r"^round 2/2 · loss ", done.stderr, re.MULTILINE)
    (command,) = [line.split("upload")[1].strip() for line in done.stdout.splitlines() if line.startswith("upload")]
    _, history, axes = read_offline(tmp_path / command.removeprefix("wandb sync "))
    assert {axes[pattern] for pattern in ("train/*", "val/*", "test/*", "comm/*", "client/*")} == {"round"}
    for name in ("train/loss", "comm/up_bytes", "test/accuracy"):
        assert [row["round"] for row in history if name in row] == [1, 2], name
    assert not any("step" in row for row in history)
    assert any(name.startswith("client/metrics") for row in history for name in row)


# ------------------------------------------------------------------ algorithms and settings

FAST = ("scaffold", "fedmuon")
PLAIN = [row.name for row in ALGORITHMS if not {"lora", "dp"} & set(row.tags)]
"""the others have tests of their own: test_lora_command, test_private_train"""


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PLAIN]
)
def test_every_algorithm_trains_from_end_to_end(fed_train, only_run, name: str) -> None:
    result = fed_train(*TINY, "--algorithm", name)
    assert result.code == 0, result.err
    facts = manifest(only_run())
    assert (facts["status"], facts["method"]) == ("finished", name)
    kept = load_checkpoint(only_run() / "checkpoints" / "last.ckpt")["fedcore"]["client_states"]["shard_of"]
    assert bool(kept) == ALGORITHMS.load(name).keeps_state


SETTINGS = {
    "labels": ["--partition", "dirichlet_label", "--alpha", "0.5"],
    "shards": ["--partition", "shards", "--clients", "10"],
    "iid": ["--partition", "iid", "--federation.weighting", "samples"],
    "no validation": ["--federation.val_share", "0"],
    "no test curve": ["--federation.test_curve", "false", "--federation.eval_every", "2"],
    "best": ["--federation.test_with", "best"],
    "pool": ["--engine", "pool", "--federation.workers", "2"],
    "memory": ["--federation.state_memory_mib", "0"],
    "rates": ["--lr", "0.05", "--federation.round_lr", "cosine", "--algorithm_options.rho", "0.5"],
    "patience": ["--trainer.patience", "1", "--rounds", "6"],
    "few samples a client": ["--federation.client_samples", "20"],
    "cadence": ["--trainer.checkpoint_every_epochs", "2", "--rounds", "5"],
}


@pytest.mark.slow
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_trains(fed_train, only_run, options: list[str]) -> None:
    result = fed_train(*TINY, *options)
    assert result.code == 0, result.err
    assert manifest(only_run())["status"] == "finished"


def test_options_win_over_rates_and_these_over_the_presets(fed_train, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "defaults_by_algorithm:\n  fedavg: {lr: 0.5, weight_decay: 0.25}\n  fedprox: {lr: 7.0}\nalgorithm: fedavg\n"
        "federation: {rounds: 10}\n"
    )
    for options, rate in (([], 0.5), (["--lr", "0.3"], 0.3), (["--lr", "0.3", "--algorithm_options.lr", "0.2"], 0.2)):
        result = fed_train("--config", tmp_path / "own.yaml", *options, "--dry_run", "true")
        assert result.code == 0, result.err
        assert f"'lr': {rate}, 'weight_decay': 0.25" in result.out
        assert f"rate        {rate * 0.998:.4g} in the first round, {rate * 0.998**10:.4g} in the last" in result.out


@pytest.mark.slow
def test_the_best_model_is_tested_where_asked_for(fed_train, only_run) -> None:
    result = fed_train(*TINY, "--rounds", "6", "--lr", "2", "--federation.test_with", "best")
    assert result.code == 0, result.err
    val, test = dict(curve(only_run(), "val/accuracy")), dict(curve(only_run(), "test/accuracy"))
    best = next(round for round, value in val.items() if value == max(val.values()))
    assert best < 6, "a rate that does not converge has its best round before the last"
    assert manifest(only_run())["metrics"]["test/accuracy"] == test[best]
    assert manifest(only_run())["metric_signatures"]["test/accuracy"] == "best model on validation"


# ------------------------------------------------------------------ modules of others

OWN = '''
import torch
from polymodal.task import TaskModule
from torch.utils.data import TensorDataset


class Regression(TaskModule):
    """A task that fedcore knows nothing of: a line through points, batches of (index, x, y)."""

    def __init__(self, bias: bool = True, seed: int = 0):
        super().__init__(seed)
        self.line = torch.nn.Linear(1, 1, bias=bias)

    def loss(self, batch, generator):
        error = (self.line(batch[1]) - batch[2]).pow(2).mean()
        return error, {}

    def evaluate(self, batch):
        wrong = (self.line(batch[1]) - batch[2]).abs()
        return {int(i): float(e) for i, e in zip(batch[0], wrong, strict=True)}

    def metrics(self, records):
        return {"error": sum(records.values()) / len(records)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def points(count, begin):
    x = torch.linspace(-1, 1, count).unsqueeze(1)
    return TensorDataset(torch.arange(begin, begin + count), x, 2 * x - 1)


def clients(seed, count=6):
    return {"clients": [points(8, 100 * i) for i in range(count)], "test": points(20, 9000)}
'''


def test_a_module_of_its_own_is_trained_on_clients_of_its_own(fed_train, only_run, tmp_path: Path) -> None:
    path = tmp_path / "own_task.py"
    path.write_text(OWN)
    options = ["--module", f"{path}:Regression", "--datasets", f"{path}:clients", "--datasets_options.count", "5"]
    result = fed_train(*options, "--algorithm", "fedavg", "--rounds", "30", "--lr", "0.3", "--fraction", "1")
    assert result.code == 0, result.err
    folder = only_run()
    error = [value for _, value in curve(folder, "test/error")]
    assert len(error) == 30
    assert error[-1] < 0.05 < error[0]
    facts = manifest(folder)
    assert (facts["data"]["name"], facts["data"]["clients"]) == ("clients", 5)
    assert facts["data"]["model"] == f"{path}:Regression"
    state = load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    assert state["net.line.weight"].item() == pytest.approx(2, abs=0.1)
    assert "error (test)" in result.out
    assert not {"client/accuracy_min", "landscape/hessian"} & facts["metrics"].keys()


# ------------------------------------------------------------------ what it says about itself


def test_help_fits_two_screens_and_starts_with_an_example(fed_train) -> None:
    result = fed_train("--help")
    lines = result.out.splitlines()
    assert result.code == 0
    assert lines[2] == "Example:"
    assert lines[3].strip().startswith("fed-train ")
    assert len(lines) <= 100
    for option in ("--algorithm", "--data", "--module", "--resume", "--list-methods", "federation (", "partition ("):
        assert any(option in line for line in lines), option
    for group in ("federation", "partition", "model"):
        assert fed_train("--help", group).code == 0


def test_methods_are_listed_with_paper_and_fidelity(fed_train) -> None:
    result = fed_train("--list-methods")
    assert [line.split()[0] for line in result.out.splitlines()] == ALGORITHMS.names()
    assert all("[" in line and "20" in line for line in result.out.splitlines())


def test_a_dry_run_tells_the_clients_and_writes_nothing(fed_train, fed_run: Path, tmp_path: Path) -> None:
    result = fed_train("--config", fed_run, "--dry_run", "true")
    assert result.code == 0, result.err
    assert not (tmp_path / "runs").exists()
    each = (1437 - manifest(fed_run)["data"]["val_samples"]) // CLIENTS
    for words in (
        f"{8 * each} training samples on clients",
        f"8 with {each} to {each} samples, scheme dirichlet_client, alpha 0.1",
        "mlp, 1,210 parameters",
        "4, 4 clients a round",
        "nothing was trained",
    ):
        assert words in result.out, result.out


@pytest.mark.parametrize(
    ("arguments", "algorithm", "rounds"),
    [
        ([], "fedmoswa", 60),
        (["--lora.ranks", "2,4,6"], "ilora", 30),
        (["--algorithm", "dp_fedavg"], "dp_fedavg", 40),
        (["--algorithm=dp_fedavg"], "dp_fedavg", 40),
    ],
)
def test_with_no_preset_the_data_and_the_method_choose_one(monkeypatch, arguments, algorithm, rounds) -> None:
    found = []
    monkeypatch.setattr("fedcore.train.train", found.append)
    monkeypatch.setattr(sys, "argv", ["fed-train", *arguments])
    assert fedcore.train.main() == 0
    (config,) = found
    assert (config.algorithm, config.federation.rounds, config.data.name) == (algorithm, rounds, "digits")
