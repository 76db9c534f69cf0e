"""Workers of the loader: they end with the process that reads from them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAINING = """
import multiprocessing
import os

from polymodal.loading import LazyLoader
from torch.utils.data import Dataset


class Pids(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return os.getpid()


if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    batches = iter(LazyLoader(Pids(), num_workers=1, multiprocessing_context=context))
    print(int(next(batches)), flush=True)
    input()
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no such kill")
def test_workers_of_a_killed_training_end(tmp_path: Path) -> None:
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    command = [sys.executable, script]
    training = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    worker = int(training.stdout.readline())
    assert alive(worker)
    training.kill()
    training.wait()
    deadline = time.monotonic() + 60
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)
