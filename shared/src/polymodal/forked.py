"""Training commands that are killed, for tests of what is left: in a forked process, or as a console script."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["Patch", "at_call", "die", "half_a_row", "interrupt", "kill_and_resume", "run_forked"]

LIMIT_SECONDS = 240
Patch = Callable[[], None]
"""Changes what a command is made of, in the process that will run it."""


def run_forked(
    main: Callable[[], int], arguments: Sequence[object], out: Path, patch: Patch = lambda: None
) -> tuple[int, str]:
    """Run a command in a fork of this process, where ``patch`` may change what it is made of.

    Args:
        main: entry point of the command, returns the exit code.
        arguments: name of the program and its arguments; ``--out`` is added unless it is there.
        out: folder for ``runs/`` and ``stderr.txt``.
        patch: called in the fork before the command.

    Returns:
        Exit code (negative: the signal that ended it) and what it wrote to stderr.

    Raises:
        AssertionError: it has not ended after four minutes.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / "stderr.txt"

    def child() -> None:
        with log.open("w") as handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
            os.dup2(handle.fileno(), 2)
            sys.stderr, sys.stdout = handle, Path(os.devnull).open("w")  # noqa: SIM115  # ends with the process
            sys.argv = [*map(str, arguments), *([] if "--out" in arguments else ["--out", str(out / "runs")])]
            torch.set_num_threads(1)
            _forget_fork_server()
            patch()
            code = main()
            handle.flush()
            os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(LIMIT_SECONDS)
    assert process.exitcode is not None, f"{arguments[0]} has not ended after {LIMIT_SECONDS} s"
    return process.exitcode, log.read_text()


def _forget_fork_server() -> None:
    """A server of loader workers that the parent has started is no child of this process, which starts its own."""
    from multiprocessing import forkserver

    server: Any = getattr(forkserver, "_forkserver", None)
    if getattr(server, "_forkserver_pid", None) is not None:
        server._forkserver_pid = server._forkserver_alive_fd = server._forkserver_address = None


# ------------------------------------------------------------------ what may happen, and when


def die() -> None:
    """Killed, as by a machine that is out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def at_call(
    owner: object, name: str, number: int = 1, happen: Callable[[], None] = die, *, after: bool = False
) -> Patch:
    """When a function is called for the so-manieth time, or when that call has ended.

    Args:
        owner: module or class of the function.
        name: of the function.
        number: of the call, from 1.
        happen: what happens then.
        after: once the call has done its work, before its caller has the result.
    """

    def patch() -> None:
        original, calls = getattr(owner, name), [0]

        def function(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            this = calls[0]
            if this == number and not after:
                happen()
            result = original(*arguments, **options)
            if this == number and after:
                happen()
            return result

        setattr(owner, name, function)

    return patch


def half_a_row(at_step: int, epoch: int) -> Patch:
    """Killed when a line of ``metrics.csv`` is half written, that of the loss of a step."""

    def patch() -> None:
        from polymodal.logs import CsvLog

        original = CsvLog.log_metrics

        def log_metrics(self: CsvLog, metrics: Any, step: int | None = None) -> None:
            if step == at_step and "train/loss" in metrics:
                with self.path.open("a") as handle:
                    handle.write(f"{step},{epoch},train/lo")
                die()
            original(self, metrics, step)

        CsvLog.log_metrics = log_metrics  # type: ignore[method-assign]

    return patch


def kill_and_resume(command: Sequence[object], out: Path, step: int) -> None:
    """As it happens to users: a console script is killed from outside, then run again with ``--resume auto``.

    Args:
        command: program and arguments; ``--out`` is added.
        out: folder for ``runs/``.
        step: it is killed once ``metrics.csv`` has a row of this step.

    Raises:
        AssertionError: it had ended before, or did not end well when it was resumed.
    """
    words = [*map(str, command), "--out", str(out / "runs")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        found = list(out.glob("runs/*/*/metrics.csv"))
        if found and any(line.startswith(f"{step},") for line in found[0].read_text().splitlines()):
            break
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run was over before it was killed"
    done = subprocess.run([*words, "--resume", "auto"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "run folder" in done.stdout
