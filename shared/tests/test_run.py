"""The run folder: what it holds, how it ends, what may be resumed."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from pathlib import Path

import pytest
import torch
from polymodal import cli, run
from polymodal.config import LoggingConfig, RunConfig, TrainerConfig
from polymodal.errors import UserError
from polymodal.run import Run, find_resume, read_manifest

DATA = {"name": "toy", "fingerprint": "f1"}


@pytest.fixture(autouse=True)
def _same_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(run._SHARED_RUN, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(out=tmp_path / "runs", log=LoggingConfig(wandb="off"))


def start(config: RunConfig, task: str = "toy", **options) -> Run:
    return Run.start(task, config, **{"name": "toy-mlp", "method": "mlp", "fidelity": "paper", "data": DATA, **options})


def finished(config: RunConfig, status: str = "finished", **options) -> Path:
    opened = start(config, **options)
    opened.finish({"test/accuracy": 0.5}, status=status)
    return opened.folder


def renamed(folder: Path, stamp: str) -> Path:
    return folder.rename(folder.with_name(f"toy-mlp-{stamp}"))


def test_a_run_folder_is_complete_from_the_start(config: RunConfig) -> None:
    opened = start(config)
    assert opened.folder.parent == config.out / "toy"
    stamp = opened.folder.name.removeprefix("toy-mlp-")
    age = dt.datetime.now() - dt.datetime.strptime(stamp, "%Y%m%d-%H%M%S")
    assert age < dt.timedelta(minutes=2)
    assert {p.name for p in opened.folder.iterdir()} == {"checkpoints", "config.yaml", "manifest.json", "metrics.csv"}
    manifest = read_manifest(opened.folder)
    expected = {"schema": "polymodal.run", "schema_version": 1, "task": "toy", "name": "toy-mlp", "method": "mlp"}
    expected |= {"fidelity": "paper", "status": "running", "ended": None, "error": None, "seed": 0, "threads": 1}
    expected |= {"job_type": "train", "precision": "32-true", "data": DATA, "metrics": {}, "resumed": []}
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["command"]
    assert {"python", "torch", "lightning", "numpy", "polymodal"} <= set(manifest["versions"])
    assert manifest["git"] is None or set(manifest["git"]) == {"commit", "dirty"}
    again = cli.parse_config(RunConfig, ["--config", str(opened.folder)])
    assert again == config


def test_the_end_is_written(config: RunConfig) -> None:
    with start(config) as opened:
        opened.note(device="a gpu", metric_signatures={"test/accuracy": "ACC"})
        opened.log({"val/accuracy": 0.25}, step=3, epoch=1)
        opened.finish({"test/accuracy": torch.tensor(0.5)})
    manifest = read_manifest(opened.folder)
    assert manifest["status"] == "finished"
    assert manifest["metrics"] == {"test/accuracy": 0.5}
    assert manifest["device"] == "a gpu"
    assert manifest["metric_signatures"] == {"test/accuracy": "ACC"}
    assert manifest["wall_s"] >= 0
    assert 20 < manifest["peak_mib"] < 100_000
    assert dt.datetime.fromisoformat(manifest["ended"]) >= dt.datetime.fromisoformat(manifest["started"])
    assert (opened.folder / "metrics.csv").read_text() == "step,epoch,name,value\n3,1,val/accuracy,0.25\n"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("two\n lines"), "failed", "ValueError: two lines"),
        (UserError("no such file"), "failed", "UserError: no such file"),
        (cli.Interrupted("saved at step 3"), "interrupted", "saved at step 3"),
    ],
)
def test_a_bad_end_is_written_too(config: RunConfig, error: BaseException, status: str, text: str) -> None:
    with pytest.raises(type(error)), start(config) as opened:
        raise error
    manifest = read_manifest(opened.folder)
    assert (manifest["status"], manifest["error"]) == (status, text)
    assert manifest["ended"]


def test_ctrl_c_says_how_to_go_on(config: RunConfig) -> None:
    with pytest.raises(cli.Interrupted) as stop, start(config) as opened:
        raise KeyboardInterrupt
    manifest = read_manifest(opened.folder)
    assert (manifest["status"], manifest["error"]) == ("interrupted", "interrupted")
    assert str(stop.value) == f"interrupted; continue with --resume {opened.folder}"


def test_a_block_left_without_finish_is_finished(config: RunConfig) -> None:
    with start(config) as opened:
        pass
    assert read_manifest(opened.folder)["status"] == "finished"


def test_a_full_disk_at_the_end_does_not_hide_why_the_run_failed(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, value: object) -> None:
        raise UserError(f"disk full while writing {path}")

    failed, whole = start(config), start(config)
    monkeypatch.setattr(run, "write_json", full)
    with pytest.raises(ZeroDivisionError), failed:
        raise ZeroDivisionError
    assert "disk full" in caplog.text
    assert read_manifest(failed.folder)["status"] == "running", "what was written before is intact"
    with pytest.raises(UserError, match="disk full"):
        whole.finish()


def test_tables_are_jsonl(config: RunConfig) -> None:
    opened = start(config)
    opened.log_table("test/rows", ["id", "text"], [["a", "grün"], ["b", "blau"]])
    lines = (opened.folder / "samples" / "test-rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"id": "a", "text": "grün"}, {"id": "b", "text": "blau"}]
    assert "grün" in lines[0]


def test_names_are_cleaned_and_never_shared(config: RunConfig) -> None:
    named = dataclasses.replace(config, name="my run/ü")
    folders = [start(named).folder for _ in range(4)]
    assert len(set(folders)) == 4
    assert all(f.parent == config.out / "toy" and f.name.startswith("my-run-") for f in folders)


def test_an_unwritable_folder_is_one_line(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*--out") as found:
        start(dataclasses.replace(config, out=tmp_path / "file" / "runs"))
    assert "\n" not in str(found.value)


def test_manifests_that_cannot_be_used(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder: it has no manifest.json"):
        read_manifest(tmp_path)
    folder = finished(config)
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))
    with pytest.raises(UserError, match=r"schema version 2; this polymodal reads up to 1: install a newer polymodal"):
        read_manifest(folder)
    path.write_text('{"schema_version": 1, "task"')
    with pytest.raises(UserError, match=r"manifest\.json: not valid JSON at line 1: cut off while it was written"):
        read_manifest(folder)
    assert start(dataclasses.replace(config)).folder != folder


# ------------------------------------------------------------------ resume


def resume(config: RunConfig, what: object) -> RunConfig:
    return dataclasses.replace(config, resume=str(what))


def test_a_run_goes_on_in_its_folder(config: RunConfig) -> None:
    folder = finished(config, "interrupted")
    before = read_manifest(folder)
    (folder / "checkpoints" / ".last.ckpt.99.tmp").write_text("half a checkpoint")
    opened = start(resume(config, folder))
    assert opened.folder == folder
    assert opened.checkpoint is None
    manifest = read_manifest(folder)
    assert manifest["status"] == "running"
    assert len(manifest["resumed"]) == 1
    assert manifest["run_id"] == before["run_id"]
    assert manifest["metrics"] == {"test/accuracy": 0.5}
    assert not list(folder.rglob("*.tmp"))
    opened.finish()
    assert read_manifest(folder)["wall_s"] >= before["wall_s"]


def test_what_resume_may_name(config: RunConfig, tmp_path: Path) -> None:
    folder = finished(config, "failed")
    assert find_resume(str(folder), "toy", config) == (folder, None)
    previous, last = folder / "checkpoints" / "previous.ckpt", folder / "checkpoints" / "last.ckpt"
    previous.write_bytes(b"")
    assert find_resume(str(folder), "toy", config) == (folder, previous)
    last.write_bytes(b"")
    assert find_resume(str(folder), "toy", config) == (folder, last)
    assert find_resume(str(previous), "toy", config) == (folder, previous)
    with pytest.raises(UserError, match="no such run folder or checkpoint"):
        find_resume(str(tmp_path / "nowhere"), "toy", config)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="is not a run folder"):
        find_resume(str(tmp_path / "a" / "b" / "x.ckpt"), "toy", config)


def test_auto_takes_the_newest_unfinished_run_of_the_same_settings(config: RunConfig) -> None:
    with pytest.raises(UserError, match="--resume auto: no unfinished run"):
        find_resume("auto", "toy", config)
    old = renamed(finished(config, "failed"), "20250101-100000")
    renamed(finished(config), "20250103-100000")
    renamed(finished(dataclasses.replace(config, seed=1), "failed"), "20250104-100000")
    other = dataclasses.replace(config, trainer=TrainerConfig(max_epochs=3))
    renamed(finished(other, "failed"), "20250105-100000")
    damaged = renamed(finished(config, "failed"), "20250106-100000")
    (damaged / "manifest.json").write_text("{")
    assert find_resume("auto", "toy", config)[0] == old
    second = renamed(finished(config, "interrupted"), "20250101-100000-2")
    renamed(finished(config, "interrupted"), "20250101-100000-1")
    assert find_resume("auto", "toy", config)[0] == second, "runs of the same second are numbered"
    newer = renamed(finished(config, "interrupted"), "20250102-100000")
    assert find_resume("auto", "toy", config)[0] == newer
    moved = dataclasses.replace(config, threads=2, log=LoggingConfig(wandb="off", tags=["x"]))
    assert find_resume("auto", "toy", moved)[0] == newer, "places and logs do not change what is trained"


def test_another_task_or_other_data_is_refused(config: RunConfig) -> None:
    folder = finished(config, "failed")
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="a run of task 'toy', not 'other'"):
        start(resume(config, folder), task="other")
    with pytest.raises(UserError, match="the data changed since that run started"):
        start(resume(config, folder), data={**DATA, "fingerprint": "f2"})
    assert (folder / "manifest.json").read_bytes() == before


def test_a_resumed_run_keeps_the_configuration_it_started_with(config: RunConfig) -> None:
    folder = finished(config, "failed")
    before = (folder / "config.yaml").read_bytes()
    start(resume(config, folder))
    assert (folder / "config.yaml").read_bytes() == before
