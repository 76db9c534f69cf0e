"""The pool against the serial engine, bit by bit; workers that die; nothing left behind."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from fedcore import RoundError
from fedcore.algorithms import ALGORITHMS, create
from fedcore.engines import pool
from fedcore.engines.segments import Segment, layout_of, read, write
from polymodal.errors import UserError
from polymodal.nested import difference
from torch import nn


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_pool{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


engines = _load("_engines")


def both(algorithm, model=engines.mlp, data=engines.clients, workers=2, **options):
    """Run serial and pool; both have the same bits, or this fails."""
    serial = engines.simulate(algorithm, model(), data(), **options)
    other = engines.simulate(algorithm, model(), data(), "pool", workers=workers, **options)
    rows = engines.run(serial), engines.run(other)
    assert not difference(engines.state(serial), engines.state(other))
    assert rows[0] == rows[1]
    assert other.engine == "pool"
    return other


@pytest.mark.parametrize("name", ALGORITHMS.names())
def test_every_algorithm_has_the_bits_of_serial(name):
    both(create(name, lr=0.05), **engines.federation_of(name))


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_number_of_workers_changes_no_bit(workers):
    both(create("fedmoswa", lr=0.05, option="I"), workers=workers)


@pytest.mark.parametrize("options", [{"max_steps": 3}, {"weighting": "samples"}, {"batch_size": 50, "shuffle": False}])
def test_plans(options):
    both(create("scaffold", lr=0.05), **options)


def test_buffers_counters_and_dropout():
    def model():
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3))

    sim = both(create("fedavg"), model, lambda: engines.clients((7, 12, 5, 9, 12, 6)))
    assert int(sim.buffers["1.num_batches_tracked"]) > 0


def test_uploads_that_are_kept_until_the_end_of_the_round():
    """``list`` reductions hold all uploads; memory of the workers must not be reused under them."""

    class Listed(type(create("scaffold"))):
        reduction = "list"

        def server_step(self, server, params, reduced, ctx):
            total = {name: sum(weight * kept[name] for _, weight, kept in reduced) for name in reduced[0][2]}
            return super().server_step(server, params, total, ctx)

    both(Listed(lr=0.05), workers=2, cohorts=[[0, 1, 2, 3, 4, 5]] * 3)


@pytest.mark.parametrize("bound", ["WAITING_BYTES", "WAITING_CLIENTS"])
def test_much_that_waits_holds_new_clients_back(monkeypatch, bound):
    monkeypatch.setattr(pool, bound, 0)
    both(create("scaffold", lr=0.05), workers=3)


def test_ranks():
    def model(rank):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    both(create("fedavg"), model=lambda: model, ranks=[1, 2, 1, 2, 1, 2])


def test_rounds_in_between_can_be_anywhere():
    """A state goes from engine to engine."""
    whole = engines.simulate(create("scaffold", lr=0.05))
    engines.run(whole)
    sim = engines.simulate(create("scaffold", lr=0.05), engine="pool", workers=2)
    engines.run(sim, 2)
    rest = engines.simulate(create("scaffold", lr=0.05))
    rest.load_state_dict(sim.state_dict())
    engines.run(rest, 2)
    assert not difference(engines.state(whole), engines.state(rest))


# ------------------------------------------------------------------ clients that fail, workers that die


class Deadly:
    """Data that ends the process it is read in."""

    def __init__(self, dataset, times, folder, how=signal.SIGKILL):
        self.dataset, self.times, self.folder, self.how = dataset, times, folder, how
        self.parent = os.getpid()

    def __len__(self):
        return len(self.dataset)

    def batch(self, indices, generator):
        if os.getpid() != self.parent and len(list(self.folder.iterdir())) < self.times:
            (self.folder / str(os.getpid())).touch()
            os.kill(os.getpid(), self.how)
        return self.dataset[indices]


def deadly(folder, times, how=signal.SIGKILL):
    return [Deadly(d, times, folder, how) if i == 2 else d for i, d in enumerate(engines.clients())]


@pytest.mark.parametrize(("times", "how"), [(1, signal.SIGKILL), (2, signal.SIGTERM)])
def test_a_worker_that_dies_is_replaced_and_its_client_repeated(tmp_path, caplog, times, how):
    both(create("scaffold", lr=0.05), data=lambda: deadly(tmp_path, times, how))
    assert caplog.text.count(f"died (exit code -{how.value})") == times


def test_a_client_that_always_kills_its_worker_is_dropped(tmp_path, caplog):
    sim = engines.simulate(create("scaffold"), data=deadly(tmp_path, 1000), engine="pool", workers=2)
    rows = engines.run(sim)
    assert [row["clients"] for row in rows] == [2, 4, 5, 1]
    assert "client 2 dropped: its worker process died 3 times" in caplog.text
    assert len(list(tmp_path.iterdir())) == 9


def test_a_worker_that_dies_between_rounds_is_replaced():
    serial = engines.simulate(create("scaffold", lr=0.05))
    engines.run(serial)
    sim = engines.simulate(create("scaffold", lr=0.05), engine="pool", workers=2)
    with sim:
        for _ in engines.COHORTS:
            sim.round()
            for pid in sim._engine.pids:
                os.kill(pid, signal.SIGKILL)
    assert not difference(engines.state(serial), engines.state(sim))


class Raises:
    """Data that cannot be read for training."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def batch(self, indices, generator):
        if generator is not None:
            raise OSError("disk gone\nsecond line")
        return self.dataset[indices]


def test_failures_of_clients_arrive_as_in_serial(caplog):
    def data():
        found = engines.clients((7, 0, 5, 9, 12, 1))
        found[4].tensors[0][3] = torch.nan
        return [*found[:3], Raises(found[3]), *found[4:]]

    sim = both(create("scaffold", lr=0.05), data=data)
    assert 4 not in sim.client_states
    for text in ("client 1 dropped: no data", "client 4 dropped: delta is not finite"):
        assert text in caplog.text
    assert "client 3 dropped: OSError: disk gone second line" in caplog.text


def test_all_fail():
    data = [Raises(d) for d in engines.clients()]
    sim = engines.simulate(create("fedavg"), data=data, engine="pool", workers=2)
    with sim, pytest.raises(RoundError, match="all 3 clients failed"):
        sim.round()


def test_a_round_that_is_given_up_leaves_no_half_done_work():
    sim = engines.simulate(create("scaffold", lr=0.05), engine="pool", workers=2, cohorts=[[0, 1, 2, 3, 4, 5]] * 4)
    serial = engines.simulate(create("scaffold", lr=0.05), cohorts=[[0, 1, 2, 3, 4, 5]] * 4)
    with sim:
        sim.round()
        results = sim._chosen_engine().run(sim._work())
        next(results)
        results.close()
        for _ in range(3):
            sim.round()
    engines.run(serial)
    assert not difference(engines.state(serial), engines.state(sim))


# ------------------------------------------------------------------ processes and memory


def shared_files():
    folder = Path("/dev/shm")
    return set(folder.iterdir()) if folder.is_dir() else set()


def descriptors():
    return psutil.Process().num_fds()


def test_close_leaves_neither_process_nor_file_nor_descriptor():
    files, before = shared_files(), descriptors()
    sim = engines.simulate(create("scaffold"), engine="pool", workers=3)
    for _ in range(3):
        sim.round()
    pids = sim._engine.pids
    assert len(set(pids)) == 3
    assert all(psutil.pid_exists(pid) for pid in pids)
    assert shared_files() == files
    sim.close()
    sim.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert descriptors() <= before
    sim.round()  # starts them again
    assert not set(sim._engine.pids) & set(pids)
    sim.close()


def test_a_simulation_that_is_forgotten_ends_its_workers():
    sim = engines.simulate(create("fedavg"), engine="pool", workers=2)
    sim.round()
    pids = sim._engine.pids
    del sim
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_memory_and_descriptors_do_not_grow():
    sim = engines.simulate(create("scaffold"), engine="pool", workers=2, cohorts=[[0, 1, 2, 3, 4, 5]] * 40)
    with sim:
        for _ in range(3):
            sim.round()
        before = descriptors()
        for _ in range(37):
            sim.round()
        segments = [len(worker.segments) for worker in sim._engine._workers]
    assert max(segments) <= 6  # one a client of the cohort, where all of them wait for the first
    assert descriptors() <= before + sum(segments)


def test_fork_warns_of_nothing_and_computes_on_one_thread():
    class Counted:
        def __init__(self, dataset):
            self.dataset = dataset

        def __len__(self):
            return len(self.dataset)

        def batch(self, indices, generator):
            if torch.get_num_threads() != 1:
                raise RuntimeError(f"{torch.get_num_threads()} threads")
            return self.dataset[indices]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both(create("fedavg"), data=lambda: [Counted(d) for d in engines.clients()])


SLOW = [pytest.param(ending, marks=pytest.mark.slow) for ending in ("SIGTERM", "SIGINT", "error")]


@pytest.mark.parametrize("ending", ["SIGKILL", *SLOW])
def test_workers_end_with_their_parent(ending):
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import _engines as engines
from fedcore.algorithms import create
import time
sim = engines.simulate(create("fedavg"), engine="pool", workers=2)
sim.round()
print(*sim._engine.pids, flush=True)
if {ending!r} == "error":
    raise ValueError
time.sleep(60)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        if ending != "error":
            process.send_signal(getattr(signal, ending))
        process.wait(30)
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers go on without their parent"
        time.sleep(0.05)


def _runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_workers_leave_interrupts_to_their_parent():
    sim = engines.simulate(create("fedavg"), engine="pool", workers=2)
    with sim:
        sim.round()
        pids = sim._engine.pids
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        sim.round()
        assert sim._engine.pids == pids


@pytest.mark.slow
def test_spawned_workers_have_the_same_bits(monkeypatch):
    def model():
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3))

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    both(create("scaffold"), model, lambda: engines.clients((7, 12, 5, 9, 12, 6)))


def test_what_cannot_be_sent_to_spawned_workers_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    sim = engines.simulate(create("fedavg"), engine="pool", loss=lambda out, y: (out.sum(dim=1) - y).square().mean())
    with pytest.raises(UserError, match="cannot send") as caught:
        sim.round()
    assert "\n" not in str(caught.value)


def test_bad_numbers_of_workers():
    sim = engines.simulate(create("fedavg"), engine="pool", workers=-1)
    with pytest.raises(UserError, match="workers=-1"):
        sim.round()


# ------------------------------------------------------------------ segments


def test_segments_hold_tensors_of_all_kinds():
    trees = [
        {"a": torch.randn(3, 5), "b": torch.tensor(7), "empty": torch.zeros(0, 4)},
        {"a": torch.arange(6, dtype=torch.int16).view(2, 3).T, "flags": torch.tensor([True, False])},
        {"half": torch.randn(9).bfloat16(), "double": torch.randn(2, dtype=torch.float64)},
    ]
    layout, size = layout_of(trees)
    first = Segment(size)
    second = Segment(size, os.dup(first.descriptor))
    write(first, layout, trees)
    assert not difference(read(second, layout, 3), trees)
    assert all(place.start % 64 == 0 for place in layout)
    tensors = [tensor for tree in read(second, layout, 3) for tensor in tree.values() if tensor.numel()]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
