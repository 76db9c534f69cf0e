"""A training command in a forked process, for tests of what is left when it is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["run_forked"]

LIMIT_SECONDS = 240


def run_forked(main: Callable[[], int], arguments: list[str], out: Path, patch: Callable[[], None]) -> tuple[int, str]:
    """Run a command in a fork of this process, where ``patch`` may change what it is made of.

    Args:
        main: entry point of the command, returns the exit code.
        arguments: name of the program and its arguments; ``--out`` is added.
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
            sys.argv = [*arguments, "--out", str(out / "runs")]
            torch.set_num_threads(1)
            patch()
            code = main()
            handle.flush()
            os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(LIMIT_SECONDS)
    assert process.exitcode is not None, f"{arguments[0]} has not ended after {LIMIT_SECONDS} s"
    return process.exitcode, log.read_text()
