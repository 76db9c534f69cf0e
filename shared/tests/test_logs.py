"""metrics.csv, the mode of W&B, and a real offline W&B run read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from polymodal.config import LoggingConfig
from polymodal.errors import UserError
from polymodal.logs import CsvLog, make_loggers
from polymodal.testing import read_offline
from polymodal.wandb_mode import wandb_mode


def test_csv_appends_and_rewinds(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "metrics.csv")
    log.log_metrics({"train/loss": 1.25, "epoch": 0}, 1)
    log.log_metrics({"train/loss": 1.0 / 3, "val/bleu4": 7.0, "epoch": 0}, 2)
    log.log_metrics({"test/bleu4": 9.0}, 2)
    with log.path.open("a") as handle:
        handle.write("3,0,train/lo")
    again = CsvLog(tmp_path / "metrics.csv")
    again.rewind(2)
    lines = log.path.read_text().splitlines()
    assert lines == [
        "step,epoch,name,value",
        "1,0,train/loss,1.25",
        "2,0,train/loss,0.3333333333333333",
        "2,0,val/bleu4,7.0",
    ]
    again.rewind(1)
    assert len(log.path.read_text().splitlines()) == 2


def test_rows_of_tests_by_validation_survive_a_rewind(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "metrics.csv")
    for step in (1, 2, 3):
        log.log_metrics({"train/loss": 1.0, "comm/up_bytes": 8, "val/accuracy": 0.5, "test/accuracy": 0.5}, step)
    log.log_metrics({"client/accuracy_min": 0.1, "task": 0}, 3)
    for step, keep, tests in ((3, True, 3), (2, True, 2), (2, False, 0)):
        log.rewind(step, 0, keep_tests=keep)
        names = [line.split(",")[2] for line in log.path.read_text().splitlines()[1:]]
        assert names.count("test/accuracy") == tests
        assert names.count("val/accuracy") == names.count("comm/up_bytes") == step
        assert "client/accuracy_min" not in names, "clients are measured at the end, again"
        assert "task" not in names


def test_wandb_mode_never_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(LoggingConfig()) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert wandb_mode(LoggingConfig()) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode(LoggingConfig()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_mode(LoggingConfig()) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(LoggingConfig()) == "off"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(LoggingConfig()) == "offline"
    assert wandb_mode(LoggingConfig(wandb="online")) == "online"


def test_tensorboard_writes_or_names_the_extra(tmp_path: Path) -> None:
    config = LoggingConfig(wandb="off", tensorboard=True)
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(UserError, match=r"polymodal\[tensorboard\]"):
            make_loggers(tmp_path, config, {}, {})
        return
    loggers = make_loggers(tmp_path, config, {}, {})
    loggers[1].log_metrics({"val/bleu4": 1.0}, 3)
    loggers[1].finalize("success")
    assert list((tmp_path / "tensorboard").glob("events.*"))


SCRIPT = """
import sys
from pathlib import Path
from polymodal.config import RunConfig
from polymodal.run import Run
config = RunConfig(out=Path(sys.argv[1]), seed=3)
with Run.start("toy", config, name="w", method="mlp", data={"name": "toy", "fingerprint": "f"}) as run:
    for step in (1, 2):
        run.log({"train/loss": 1 / step, "val/accuracy": step / 4}, step, 0)
    run.log_table("test/translations", ["reference", "translation"], [["guten tag", "guten abend"], ["ä", "漢"]])
    run.finish({"test/accuracy": 0.5})
print(run.sync_command)
print(run.folder)
with Run.start("fed", config, name="r", step_name="round") as run:
    run.log({"train/loss": 1.0, "comm/up_bytes": 8.0}, 1, 0)
print(run.sync_command)
"""


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    folder = tmp_path_factory.mktemp("wandb")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(folder), "NETRC": str(folder / "none"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    command, path, rounds = done.stdout.strip().splitlines()[-3:]
    return command, Path(path), rounds


def test_offline_wandb_run_has_config_metrics_axes_and_table(offline_run: tuple[str, Path, str]) -> None:
    command, folder, _ = offline_run
    assert command.startswith("wandb sync ")
    wandb_folder = Path(command.removeprefix("wandb sync "))
    assert wandb_folder.is_relative_to(folder / "wandb")
    config, history, axes = read_offline(wandb_folder)
    assert config["seed"] == 3
    assert config["trainer"]["max_epochs"] == 10
    assert config["method"] == "mlp"
    assert config["data_info"]["fingerprint"] == "f"
    values = [(row["step"], row["train/loss"]) for row in history if "train/loss" in row]
    assert values == [(1, 1.0), (2, 0.5)]
    assert (axes["train/*"], axes["comm/*"]) == ("step", "round")
    table = next(row for row in history if "test/translations.nrows" in row)
    assert (table["test/translations.nrows"], table["test/translations._type"]) == (2, "table-file")
    stored = next((wandb_folder / "files" / "media").rglob("*.table.json"))
    assert json.loads(stored.read_text())["data"][1] == ["ä", "漢"]


def test_a_run_that_counts_rounds_has_them_on_every_axis(offline_run: tuple[str, Path, str]) -> None:
    _, history, axes = read_offline(Path(offline_run[2].removeprefix("wandb sync ")))
    (row,) = [row for row in history if "train/loss" in row]
    assert row["round"] == 1
    assert "step" not in row
    axes = {pattern: axis for pattern, axis in axes.items() if pattern.endswith("*")}
    assert axes.keys() >= {"train/*", "val/*", "test/*", "comm/*", "perf/*", "client/*"}
    assert set(axes.values()) == {"round"}


def test_run_folder_of_the_offline_run(offline_run: tuple[str, Path, str]) -> None:
    _, folder, _ = offline_run
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["metrics"] == {"test/accuracy": 0.5}
    assert manifest["wall_s"] > 0
    rows = (folder / "samples" / "test-translations.jsonl").read_text().splitlines()
    assert json.loads(rows[0]) == {"reference": "guten tag", "translation": "guten abend"}
