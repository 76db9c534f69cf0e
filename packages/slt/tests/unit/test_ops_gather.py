"""Two real gloo processes with unequal batches give the gradient of one process with the whole batch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("_gather_worker.py")
_spec = importlib.util.spec_from_file_location("slt_gather_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


@pytest.fixture(scope="module", params=["plain", pytest.param("ddp", marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gather")
    outs = [folder / f"rank{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), folder / "store", out, request.param], stderr=subprocess.PIPE, text=True
        )
        for rank, out in enumerate(outs)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(out, weights_only=True) for out in outs]


@pytest.mark.parametrize("variant", ["infonce", "gfslt", "multi"])
def test_gradients_equal_those_of_one_process(ranks, variant):
    x, y = worker.data()
    alone = worker.gradients(worker.Pair(), x, y, worker.IDS)[variant]
    for result in ranks:
        found = result["gradients"][variant]
        torch.testing.assert_close(found["loss"], alone["loss"], rtol=0, atol=1e-12)
        for name in ("first", "second", "scale"):
            torch.testing.assert_close(found[name], alone[name], rtol=0, atol=1e-12)


def test_a_rank_may_bring_no_rows(ranks):
    for result in ranks:
        assert torch.equal(result["uneven"], torch.full((2, 3), 7.0))
