"""The same rounds in other simulators: pfl-research (package ``pfl``) and Flower (``flwr[simulation]``)."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks._bench import Samples

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import TensorDataset

    from benchmarks._fedcore_inputs import Workload

SECONDS = 600
"""after which a simulator is given up: Ray waits for ever where it cannot open its ports"""
WARMUP = 2
"""rounds that do not count"""


def have(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def peer_rounds(peer: str, workload: Workload, runs: int) -> tuple[Samples, float] | None:
    """Rounds of a simulator in a process of its own, and seconds before the second one; None where it does not run."""
    given = json.dumps({**asdict(workload), "peer": peer, "runs": runs})
    command = [sys.executable, str(Path(__file__).resolve()), given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, timeout=SECONDS
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        sys.stderr.write(f"{peer} does not run here\n")
        return None
    return Samples(found["wall"], found["cpu"]), found["started"]


class _Clock:
    """Wall and CPU seconds between ticks."""

    def __init__(self) -> None:
        self.samples, self.ticks = Samples(), 0
        self._last: tuple[float, float] | None = None

    def tick(self) -> None:
        now = (time.perf_counter(), time.process_time())
        self.ticks += 1
        if self._last is not None and self.ticks > WARMUP:
            self.samples.wall.append(now[0] - self._last[0])
            self.samples.cpu.append(now[1] - self._last[1])
        self._last = now


def pfl_rounds(workload: Workload, data: list[TensorDataset], runs: int) -> Samples:
    """Seconds of rounds of FedAvg in pfl-research, in this process."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    network = workload.network()

    def loss(inputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
        network.train()
        return F.cross_entropy(network(inputs), targets)

    network.loss = loss  # type: ignore[assignment]
    network.metrics = lambda inputs, targets, **options: {}  # type: ignore[assignment]
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
    draw, clock = np.random.default_rng(0), _Clock()

    def dataset() -> FederatedDataset:
        made = [PyTorchTensorDataset(one.tensors) for one in data]
        return FederatedDataset(lambda user: made[user], lambda: int(draw.integers(len(made))))

    class Timed(TrainingProcessCallback):
        def after_central_iteration(self, *arguments: Any, **options: Any) -> tuple[bool, Any]:
            from pfl.metrics import Metrics

            clock.tick()
            return False, Metrics()

    logging.getLogger("pfl").setLevel(logging.ERROR)
    asyncio.set_event_loop(asyncio.new_event_loop())
    rounds = runs + WARMUP
    FederatedAveraging().run(
        NNAlgorithmParams(rounds, 10**6, max(1, workload.clients // 10), 0),
        SimulatedBackend(dataset(), dataset()),
        model,
        NNTrainHyperParams(
            local_batch_size=workload.batch, local_num_epochs=1, local_learning_rate=0.05, local_max_grad_norm=None
        ),
        NNEvalHyperParams(local_batch_size=None),
        [Timed()],
        send_metrics_to_platform=False,
    )
    return clock.samples


def flower_rounds(workload: Workload, runs: int) -> tuple[Samples, float]:
    """Seconds of rounds of FedAvg in Flower's simulation (Ray, two cores), and those before the first of them."""
    from flwr.client import ClientApp, NumPyClient
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.simulation import run_simulation

    clock, began = _Clock(), time.perf_counter()
    started: list[float] = []

    class Client(NumPyClient):
        def __init__(self, number: int) -> None:
            self.number = number

        def fit(self, parameters: Any, config: Any) -> tuple[Any, int, dict[str, Any]]:
            network, batches = _flower_client(workload, self.number)
            return _trained(network, batches, parameters), workload.samples, {}

    class Timed(FedAvg):
        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            if failures:
                raise RuntimeError(f"Flower: {failures[0]}")
            merged = super().aggregate_fit(server_round, results, failures)
            if not started:
                started.append(time.perf_counter() - began)
            clock.tick()
            return merged

    def server(context: Any) -> ServerAppComponents:
        weights = [value.numpy() for value in workload.network().state_dict().values()]
        share = max(1, workload.clients // 10) / workload.clients
        strategy = Timed(fraction_fit=share, fraction_evaluate=0.0, initial_parameters=ndarrays_to_parameters(weights))
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=runs + WARMUP))

    def client(context: Any) -> Any:
        return Client(int(context.node_config["partition-id"])).to_client()

    logging.getLogger("flwr").setLevel(logging.ERROR)
    resources = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": 2, "log_to_driver": False},
    }
    run_simulation(ServerApp(server_fn=server), ClientApp(client_fn=client), workload.clients, backend_config=resources)
    return clock.samples, started[0]


_KEPT: dict[str, Any] = {}


def _flower_client(workload: Workload, number: int) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """Model and batches, made once in each of Ray's processes."""
    import torch

    if workload.name not in _KEPT:
        torch.set_num_threads(1)
        _KEPT[workload.name] = workload.network(), workload.data()
    network, data = _KEPT[workload.name]
    return network, list(zip(*(tensor.split(workload.batch) for tensor in data[number].tensors), strict=True))


def _trained(network: nn.Module, batches: list[tuple[Tensor, ...]], parameters: Any) -> list[Any]:
    """One epoch of SGD from the given parameters."""
    import torch
    import torch.nn.functional as F

    names = list(network.state_dict())
    network.load_state_dict({name: torch.as_tensor(value) for name, value in zip(names, parameters, strict=True)})
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for inputs, targets in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    return [value.numpy() for value in network.state_dict().values()]


def _alone(given: dict[str, Any]) -> dict[str, Any]:
    import torch

    from benchmarks._fedcore_inputs import Workload

    torch.set_num_threads(1)
    peer, runs = given.pop("peer"), given.pop("runs")
    workload = Workload(**given)
    if peer == "pfl":
        began = time.perf_counter()
        samples = pfl_rounds(workload, workload.data(), runs)
        started = time.perf_counter() - began - sum(samples.wall)
    else:
        samples, started = flower_rounds(workload, runs)
    return {**asdict(samples), "started": started}


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(_alone(json.loads(sys.argv[1]))) + "\n")
