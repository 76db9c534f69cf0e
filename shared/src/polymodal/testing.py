"""What tests of commands share: calls in this process and as console scripts, and what is in a run folder.

A plugin of pytest, named in the ``conftest.py`` of the repository; its fixtures do nothing unless they are asked for.
"""

from __future__ import annotations

import csv
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = [
    "QUIET",
    "Result",
    "as_command",
    "assert_same_results",
    "cache_folder",
    "call_command",
    "call_training",
    "complains",
    "curve",
    "folder_of",
    "manifest",
    "metric_rows",
    "one_error",
    "one_thread",
    "only_run",
    "read_offline",
    "rows",
    "run_script",
    "use_cache",
]

QUIET = ("--log.wandb", "off", "--trainer.progress", "none")
"""Options of a training command: no W&B, no bars."""


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


# ------------------------------------------------------------------ surroundings


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch has one thread, and afterwards as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache folder of a session's tests, so that built-in data are made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def use_cache(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands keep what they make in ``cache_folder``."""
    monkeypatch.setenv("POLYMODAL_CACHE", str(cache_folder))


# ------------------------------------------------------------------ calls


@pytest.fixture
def call_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """``call_command(main, "css-data", *arguments)``: a command in this process."""

    def call(main: Callable[[], int], name: str, *arguments: object) -> Result:
        monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))  # put back after the command
        monkeypatch.delenv("POLYMODAL_SHARED_RUN", raising=False)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        code = main()
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def call_training(call_command: Callable[..., Result], tmp_path: Path) -> Callable[..., Result]:
    """``call_training(main, "css-train", *arguments)``: runs go to ``tmp_path / "runs"``, W&B is off."""

    def call(main: Callable[[], int], name: str, *arguments: object) -> Result:
        out = () if "--out" in arguments else ("--out", tmp_path / "runs")
        return call_command(main, name, *arguments, *QUIET, *out)

    return call


@contextmanager
def as_command(name: str, **environment: str) -> Iterator[None]:
    """Within it, ``sys.argv`` is that of a command and its stdout goes nowhere: for fixtures of a whole session."""
    with pytest.MonkeyPatch.context() as patch, Path(os.devnull).open("w") as nowhere:
        for key, value in environment.items():
            patch.setenv(key, value)
        patch.setattr(sys, "argv", [name])
        patch.setattr(sys, "stdout", nowhere)
        yield


def run_script(
    command: Sequence[object], folder: Path, timeout: int = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A console script as a job runs it: no home folder, no account of W&B, no terminal, one thread.

    Args:
        command: program and arguments.
        folder: where it runs.
        timeout: seconds.
        environment: further variables.
    """
    keep = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    keep |= {"HOME": str(folder / "absent"), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env=keep,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def one_error(result: Result, *parts: str) -> str:
    """Asserts exit code 2 and one line of error, the last, with all the given parts; returns the line."""
    assert result.code == 2, result
    assert "Traceback" not in result.err
    lines = [line for line in result.err.splitlines() if ": error: " in line]
    assert len(lines) == 1, result.err
    assert result.err.rstrip().endswith(lines[0])
    for part in parts:
        assert part in lines[0], (part, lines[0])
    return lines[0]


@pytest.fixture
def complains() -> Callable[..., str]:
    """``one_error``."""
    return one_error


# ------------------------------------------------------------------ run folders


def folder_of(out: Path) -> Path:
    """The one run folder in ``out / "runs"``."""
    (found,) = (path for path in out.glob("runs/*/*") if path.is_dir())
    return found


@pytest.fixture
def only_run(tmp_path: Path) -> Callable[[], Path]:
    """Finds the one run folder that a test made."""
    return lambda: folder_of(tmp_path)


def manifest(run: Path) -> dict[str, Any]:
    """``manifest.json``."""
    loaded: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return loaded


def metric_rows(run: Path) -> list[dict[str, str]]:
    """Rows of ``metrics.csv`` by column."""
    with (run / "metrics.csv").open() as handle:
        return list(csv.DictReader(handle))


def rows(run: Path) -> list[list[str]]:
    """Lines of ``metrics.csv`` with its head, without times and memory: what two runs must share."""
    with (run / "metrics.csv").open() as handle:
        return [row for row in csv.reader(handle) if not row[2].startswith("perf/")]


def curve(run: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric."""
    return [(int(row["step"]), float(row["value"])) for row in metric_rows(run) if row["name"] == name]


def assert_same_results(whole: Path, resumed: Path) -> None:
    """A run that went on is finished, with the scores and rows of the run that nobody stopped."""
    assert manifest(resumed)["status"] == "finished"
    assert manifest(resumed)["metrics"] == manifest(whole)["metrics"]
    assert rows(resumed) == rows(whole)


# ------------------------------------------------------------------ offline W&B


def read_offline(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, str]]:
    """Configuration, history rows, and the x-axis of each metric pattern in an offline run of W&B."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    axes: dict[str, str] = {}
    for data in _records(next(folder.glob("*.wandb"))):
        record = messages.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config |= {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.run.config.update}
        elif kind == "history":
            history.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        elif kind == "metric":
            axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
    return config, history, axes


def _records(path: Path) -> Iterator[bytes]:
    """Records of a LevelDB-style log: 32 KiB blocks after a 7-byte file header; each piece has crc, length, type."""
    data, position, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""
