"""Inputs of the fedcore benchmarks: workloads, the floor below them, measurements in processes of their own.

Run as a file it is such a process: its argument is JSON, and so is what it prints.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import TensorDataset

CLASSES = 10
PLAIN = {"weight_decay": 0.0, "clip_grad": 0.0}
"""Local SGD and nothing else, which is what the floor does."""


@dataclass(frozen=True)
class Workload:
    """A federation of equal clients.

    Args:
        name: in tables.
        model: ``mlp`` or ``cnn``.
        samples: of a client.
        batch: of a local step.
        clients: of the federation; a tenth of them takes part in a round.
        runs: measured rounds.
    """

    name: str
    model: str
    samples: int
    batch: int = 50
    clients: int = 100
    runs: int = 40

    def network(self) -> nn.Module:
        """The model, always the same."""
        import torch
        from torch import nn

        torch.manual_seed(0)
        if self.model == "mlp":
            return nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, CLASSES))
        convolution = [
            nn.Conv2d(3, 64, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        head = [nn.Linear(1600, 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, CLASSES)]
        return nn.Sequential(*convolution, nn.Flatten(), *head)

    def data(self) -> list[TensorDataset]:
        """One data set a client."""
        import torch
        from torch.utils.data import TensorDataset

        draw = torch.Generator().manual_seed(1)
        shape = (1, 28, 28) if self.model == "mlp" else (3, 32, 32)
        return [
            TensorDataset(
                torch.randn(self.samples, *shape, generator=draw),
                torch.randint(CLASSES, (self.samples,), generator=draw),
            )
            for _ in range(self.clients)
        ]

    def floor(self, data: list[TensorDataset], *, decay: float = 0.0, clip: float = 0.0) -> Callable[[], None]:
        """Forward, backward and a step of ``torch.optim.SGD`` on a round's batches, by one model, no federation.

        The batches lie ready: gathering them is part of what a simulation costs.
        """
        import torch
        import torch.nn.functional as F

        network = self.network()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, weight_decay=decay)
        cohort = data[: max(1, self.clients // 10)]
        batches = [pair for one in cohort for pair in zip(*(t.split(self.batch) for t in one.tensors), strict=True)]

        def call() -> None:
            for inputs, targets in batches:
                optimizer.zero_grad()
                F.cross_entropy(network(inputs), targets).backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
                optimizer.step()

        return call

    def simulation(
        self,
        data: list[TensorDataset],
        algorithm: str = "fedavg",
        engine: str = "serial",
        workers: int = 2,
        **options: Any,
    ) -> Any:
        """A simulation; without options the algorithm has its defaults."""
        from fedcore import Simulation
        from fedcore.algorithms import create

        return Simulation(
            self.network(),
            data,
            create(algorithm, **options),
            batch_size=self.batch,
            rounds=100_000,
            engine=engine,
            workers=workers,
        )


MLP_100 = Workload("MLP-100", "mlp", 100, runs=60)
MLP_500 = Workload("MLP-500", "mlp", 500, runs=30)
CNN_100 = Workload("CNN-100", "cnn", 100, runs=10)
MLP_SMALL = Workload("MLP-100 at batch 10", "mlp", 100, batch=10, runs=40)


def quick(workload: Workload) -> Workload:
    """The same with as few clients and samples as will do."""
    return Workload(workload.name, workload.model, 4, 2, clients=10, runs=2)


# ---------------------------------------------------------------------------------- processes of their own


def measured(workload: Workload, kind: str, rounds: int) -> dict[str, float]:
    """What a process says that runs ``kind`` (``floor``, or an algorithm and an engine, ``fedavg/pool``) alone."""
    given = json.dumps({**workload.__dict__, "kind": kind, "rounds": rounds})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _alone(given: dict[str, Any]) -> dict[str, float]:
    """Seconds before the first round is done, those of a later one, and the peak of memory; imports come first."""
    import torch

    torch.set_num_threads(1)
    # The first optimizer imports 165 MiB of torch's compiler; a simulation needs none, which would hide what it needs.
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    kind, rounds = given.pop("kind"), given.pop("rounds")
    workload = Workload(**given)
    data = workload.data()
    state = 0
    if kind == "floor":
        began = time.perf_counter()
        call: Callable[[], Any] = workload.floor(data)
    else:
        import fedcore.algorithms
        from fedcore import Simulation  # noqa: F401

        name, _, engine = kind.partition("/")
        fedcore.algorithms.ALGORITHMS.load(name)
        began = time.perf_counter()
        simulation = workload.simulation(data, name, engine or "serial")
        call = simulation.round
    call()
    first = time.perf_counter() - began
    later = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        later.append(time.perf_counter() - began)
    if kind != "floor":
        trees = [simulation.server_state, *simulation.client_states.values()]
        state = sum(value.numel() * value.element_size() for tree in trees for value in tree.values())
        simulation.close()
    return {"first": first, "later": sorted(later)[len(later) // 2], "peak": _peak(), "state": state / 2**20}


def _peak() -> float:
    """Peak of this process's memory in MiB (Linux; elsewhere the parent's, if that is larger)."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts what the process was before it was this program
        return float(re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))[1]) / 1024  # type: ignore[index]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_alone(json.loads(sys.argv[1]))) + "\n")
