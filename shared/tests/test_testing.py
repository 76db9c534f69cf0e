"""What tests of commands share: calls, errors, kills, run folders."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import types
from pathlib import Path

import pytest
from polymodal.forked import at_call, half_a_row, interrupt, kill_and_resume, run_forked
from polymodal.logs import CsvLog
from polymodal.testing import (
    Result,
    as_command,
    assert_same_results,
    curve,
    folder_of,
    manifest,
    metric_rows,
    one_error,
    rows,
    run_script,
)


def speak() -> int:
    """A command that says what it was given."""
    sys.stdout.write(" ".join(sys.argv))
    sys.stderr.write("noted")
    os.environ["OMP_NUM_THREADS"] = "7"
    return 3


def test_a_call_gives_code_and_words_and_puts_everything_back(call_command, monkeypatch) -> None:
    monkeypatch.setenv("POLYMODAL_SHARED_RUN", "elsewhere")
    sys.stdout.write("before")
    result = call_command(speak, "speak", "--seed", 3)
    assert result == Result(3, "speak --seed 3", "noted")
    assert "POLYMODAL_SHARED_RUN" not in os.environ
    monkeypatch.undo()
    assert os.environ["OMP_NUM_THREADS"] != "7"


def test_a_training_call_is_quiet_and_writes_below_the_tests_folder(call_training, tmp_path: Path) -> None:
    quiet = "--log.wandb off --trainer.progress none"
    assert call_training(speak, "t", "--seed", 3).out == f"t --seed 3 {quiet} --out {tmp_path / 'runs'}"
    assert call_training(speak, "t", "--out", "here").out == f"t --out here {quiet}"


def test_as_command_is_silent_and_undone(capsys, monkeypatch) -> None:
    before = sys.argv
    with as_command("speak", SPOKEN="yes"):
        sys.stdout.write("nobody hears it")
        assert (sys.argv, os.environ["SPOKEN"]) == (["speak"], "yes")
    assert sys.argv is before
    assert "SPOKEN" not in os.environ
    assert capsys.readouterr().out == ""


def test_a_script_has_neither_home_nor_account(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "none")
    code = "import os, sys; print(os.getcwd(), os.environ['HOME'], os.environ['MORE'], 'WANDB_API_KEY' in os.environ)"
    done = run_script([sys.executable, "-c", code], tmp_path, MORE="1")
    assert done.stdout.split() == [str(tmp_path.resolve()), str(tmp_path / "absent"), "1", "False"]


@pytest.mark.parametrize(
    ("result", "parts"),
    [
        (Result(1, "", "p: error: a; b\n"), []),
        (Result(2, "", "p: note\n"), []),
        (Result(2, "", "p: error: a\np: error: b\n"), []),
        (Result(2, "", "p: error: a\np: note\n"), []),
        (Result(2, "", "Traceback\np: error: a\n"), []),
        (Result(2, "", "p: error: a\n"), ["b"]),
    ],
)
def test_an_error_is_one_line_at_the_end(result: Result, parts: list[str]) -> None:
    with pytest.raises(AssertionError):
        one_error(result, *parts)
    assert one_error(Result(2, "", "p: note\np: error: a; b\n"), "a", "b") == "p: error: a; b"


def run_folder(out: Path, *lines: str, **facts: object) -> Path:
    folder = out / "runs" / "toy" / "linear"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,epoch,name,value\n" + "".join(f"{line}\n" for line in lines))
    (folder / "manifest.json").write_text(json.dumps({"status": "finished", "metrics": {"test/loss": 1.0}, **facts}))
    return folder


def test_a_run_folder_is_found_and_read(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "1,0,train/loss,0.5", "1,0,perf/step_ms,9.0", "2,0,train/loss,0.25")
    (folder.parent / "a file").write_text("")
    assert folder_of(tmp_path) == folder
    assert manifest(folder)["status"] == "finished"
    assert metric_rows(folder)[1] == {"step": "1", "epoch": "0", "name": "perf/step_ms", "value": "9.0"}
    assert rows(folder)[1:] == [["1", "0", "train/loss", "0.5"], ["2", "0", "train/loss", "0.25"]]
    assert curve(folder, "train/loss") == [(1, 0.5), (2, 0.25)]
    (tmp_path / "runs" / "toy" / "second").mkdir()
    with pytest.raises(ValueError, match="too many"):
        folder_of(tmp_path)


def test_runs_differ_by_rows_scores_and_status_not_by_times(tmp_path: Path) -> None:
    whole = run_folder(tmp_path / "a", "1,0,train/loss,0.5", "1,0,perf/step_ms,9.0")
    assert_same_results(whole, run_folder(tmp_path / "b", "1,0,train/loss,0.5", "1,0,perf/step_ms,2.0"))
    for name, lines, facts in (
        ("c", ["1,0,train/loss,0.6"], {}),
        ("d", ["1,0,train/loss,0.5"], {"metrics": {}}),
        ("e", ["1,0,train/loss,0.5"], {"status": "running"}),
    ):
        with pytest.raises(AssertionError):
            assert_same_results(whole, run_folder(tmp_path / name, *lines, **facts))


# ------------------------------------------------------------------ kills


def test_something_happens_at_a_call_or_after_it() -> None:
    seen: list[object] = []
    for after in (False, True):
        owner = types.SimpleNamespace(add=seen.append)
        at_call(owner, "add", 2, lambda: seen.append("now"), after=after)()
        for number in range(3):
            owner.add(number)
    assert seen == [0, "now", 1, 2, 0, 1, "now", 2]


def test_a_fork_tells_how_it_ended(tmp_path: Path) -> None:
    assert run_forked(speak, ["speak", 1], tmp_path) == (3, "noted")
    assert os.environ["OMP_NUM_THREADS"] != "7"
    code, _ = run_forked(lambda: speak(), ["speak"], tmp_path, at_call(sys.modules[__name__], "speak"))
    assert code == -signal.SIGKILL


def test_loader_workers_start_in_the_fork_where_the_parent_has_had_some(tmp_path: Path) -> None:
    def fetch() -> int:
        process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
        process.start()
        process.join()
        return process.exitcode or 0

    assert fetch() == 0, "so the parent has a server of its own"
    assert run_forked(fetch, ["fetch"], tmp_path) == (0, "")
    assert fetch() == 0, "and keeps it"


def test_a_row_is_left_half_written(tmp_path: Path) -> None:
    def log() -> int:
        table = CsvLog(tmp_path / "metrics.csv")
        for step in (1, 2, 3):
            table.log_metrics({"train/loss": 1.0, "epoch": 0.0}, step=step)
        return 0

    code, error = run_forked(log, ["log"], tmp_path / "out", half_a_row(2, 0))
    assert code == -signal.SIGKILL, error
    assert (tmp_path / "metrics.csv").read_text().endswith("\n2,0,train/lo")


def test_ctrl_c_reaches_the_fork(tmp_path: Path) -> None:
    def stopped() -> int:
        try:
            interrupt()
        except KeyboardInterrupt:
            return 130
        return 0

    assert run_forked(stopped, ["stopped"], tmp_path)[0] == 130


SCRIPT = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]) / "toy" / "linear"
if "--resume" in sys.argv:
    print("run folder", folder)
    sys.exit(int(sys.argv[1]))
folder.mkdir(parents=True)
(folder / "metrics.csv").write_text("step,epoch,name,value\\n3,0,train/loss,1\\n")
if sys.argv[1] != "2":
    time.sleep(60)
"""


def test_a_script_is_killed_from_outside_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT]
    kill_and_resume([*command, 0], tmp_path / "well", 3)
    with pytest.raises(AssertionError):
        kill_and_resume([*command, 1], tmp_path / "failed", 3)
    with pytest.raises(AssertionError, match="over before it was killed"):
        kill_and_resume([*command, 2], tmp_path / "fast", 4)
