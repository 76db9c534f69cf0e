"""Work in processes: results as they come, one thread each, an end for Ctrl-C, an error, a death and a break."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from polymodal.pool import in_processes

WORK = """
import os, signal, sys, time
from polymodal.pool import in_processes

def maker(base):
    made = [0]
    def work(item):
        made[0] += 1
        if item == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "fail":
            raise ValueError("no such item")
        if item == "sleep":
            time.sleep(120)
        return base + item, made[0], os.getpid(), os.environ["OMP_NUM_THREADS"]
    return work

def threads():
    import torch
    return lambda item: torch.get_num_threads()
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that workers find, too."""
    (tmp_path / "pool_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delitem(sys.modules, "pool_work", raising=False)
    import pool_work

    yield pool_work
    del sys.modules["pool_work"]
    assert not multiprocessing.active_children()


def test_every_item_is_worked_on_once_in_another_process(work) -> None:
    found = dict(in_processes(range(6), partial(work.maker, 10), 2, "sums"))
    assert {item: total for item, (total, *_) in found.items()} == {item: item + 10 for item in range(6)}
    processes = {pid for _, _, pid, _ in found.values()}
    assert 1 <= len(processes) <= 2
    assert os.getpid() not in processes
    assert sum(max(made for _, made, pid, _ in found.values() if pid == one) for one in processes) == 6, "made once"
    assert {threads for *_, threads in found.values()} == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_torch_has_one_thread_there(work) -> None:
    assert dict(in_processes([0], work.threads, 2, "counts")) == {0: 1}


def test_a_dead_worker_is_one_clear_error_after_what_was_done(work) -> None:
    results = in_processes(["a", "die", "sleep"], partial(work.maker, ""), 1, "models")
    item, (text, *_) = next(results)
    assert (item, text) == ("a", "a")
    with pytest.raises(RuntimeError, match=r"died .*; finished models are kept: run again, with fewer --jobs"):
        next(results)


def test_an_error_of_an_item_ends_the_workers(work) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="no such item"):
        list(in_processes(["fail", "sleep"], partial(work.maker, ""), 2, "items"))
    assert time.monotonic() - began < 60


def test_a_caller_that_stops_ends_the_workers(work) -> None:
    began = time.monotonic()
    results = in_processes(["a", "sleep"], partial(work.maker, ""), 2, "items")
    assert next(results)[0] == "a"
    results.close()
    assert time.monotonic() - began < 60


def test_ctrl_c_ends_the_workers_and_what_is_done_is_kept(work, tmp_path: Path) -> None:
    script = """
    from functools import partial
    from pool_work import in_processes, maker
    if __name__ == "__main__":
        try:
            for item, (text, made, pid, threads) in in_processes(["a", "sleep"], partial(maker, ""), 1, "items"):
                print(item, pid, flush=True)
        except KeyboardInterrupt:
            print("stopped")
    """
    (tmp_path / "main.py").write_text(textwrap.dedent(script))
    command = [sys.executable, "main.py"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    item, worker = process.stdout.readline().split()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, error = process.communicate(timeout=60)
    assert (item, out) == ("a", "stopped\n"), error
    assert "Traceback" not in error
    with pytest.raises(ProcessLookupError):
        os.kill(int(worker), 0)
