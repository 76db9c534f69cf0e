"""Peak memory of region distillation next to that of the binary loss, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHANNELS, OLD, SIDE, IMAGES = 151, 146, 96, 4
TENSOR = 4 * CHANNELS * SIDE * SIDE * IMAGES


def peak(kind):
    """Bytes above what was in use before the forward pass, to the end of the backward pass."""
    worker = Path(__file__).with_name("_memory_worker.py")
    sizes = [str(n) for n in (CHANNELS, OLD, SIDE, IMAGES)]
    done = subprocess.run(
        [sys.executable, str(worker), kind, *sizes],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory of a process from /proc")
def test_peak_memory_stays_within_that_of_the_binary_loss():
    binary = peak("binary")
    # The measure sees the gradient and the working tensor of the binary loss, and what plain code would take.
    assert 1.8 * TENSOR < binary < 2.6 * TENSOR
    assert peak("whole") > 1.6 * binary
    for variant in ("two_region", "mib"):
        assert peak(variant) < 1.3 * binary
