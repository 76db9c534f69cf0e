"""Flower's simulation on this machine: a node a client, computed by Ray's worker processes."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import pickle
import queue
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError

from fedcore.engines.base import Federation
from fedcore.flower.client import client_app
from fedcore.flower.engine import FlowerEngine
from fedcore.flower.inprocess import InProcessGrid
from fedcore.flower.nodes import Nodes

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

    from fedcore.simulation import Simulation

__all__ = ["RayRuntime", "start"]

log = logging.getLogger(__name__)
ATTEMPTS = 2
"""Ray gives up where its agent needs more than 15 s to start, as on a very busy machine"""
OBJECT_STORE_BYTES = 256 * 2**20
"""Ray's shared memory for messages on their way; larger ones go to files"""


def start(simulation: Simulation) -> FlowerEngine:
    """The engine of a simulation on this machine: by Ray, or in this process where Ray does not start.

    Raises:
        UserError: a model on an accelerator, or models and data that cannot be sent to other processes.
    """
    federation = simulation.federation
    if any(learner.device.type != "cpu" for learner in federation.learners.values()):
        raise UserError("engine=flower simulates on the CPU; use engine=batched, or deploy nodes with accelerators")
    runtime = RayRuntime(federation, simulation.workers)
    try:
        return FlowerEngine(federation, Nodes(runtime.start()), None, runtime.close)
    except _NoRay as error:
        runtime.close()
        log.warning("Flower's simulation did not start (%s); its nodes run in this process, one after the other", error)
        app = client_app(lambda context: federation)
        return FlowerEngine(federation, Nodes(InProcessGrid(app, len(federation.data))), None)


class _NoRay(RuntimeError):
    """Ray is not there or does not start."""


class RayRuntime:
    """Flower's simulation runtime in a thread, whose server app hands out its grid and waits.

    Workers read models and data once, from a file that they map; messages carry the rest.

    Args:
        federation: models, data, algorithms.
        workers: processes (default: cores), at most one a client.
    """

    def __init__(self, federation: Federation, workers: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        self.federation, self.nodes = federation, len(federation.data)
        self.workers = min(workers or cores, self.nodes)
        self._folder = tempfile.TemporaryDirectory(prefix="fedcore-flower-")
        self._grids: queue.Queue[Grid | BaseException] = queue.Queue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> Grid:
        """The grid, once a worker has answered.

        Raises:
            UserError: models or data cannot be pickled.
        """
        if importlib.util.find_spec("ray") is None:
            raise _NoRay("no module ray")
        path = Path(self._folder.name) / "federation.pt"
        _save(self.federation, path)
        self._thread = threading.Thread(target=self._run, args=(path,), daemon=True, name="fedcore-flower")
        self._thread.start()
        found = self._grids.get()
        if isinstance(found, BaseException):
            raise _NoRay(" ".join(str(found).split())[:200])
        return found

    def close(self) -> None:
        """End the workers."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(30)
            self._thread = None
        self._folder.cleanup()

    def _run(self, path: Path) -> None:
        """Life of the thread."""
        try:
            logging.getLogger("flwr").setLevel(logging.ERROR)  # its banner and its notices about later versions
            _init_ray(self.workers)
            self._simulate(path)
        except BaseException as error:  # whatever ends Ray, or Flower with SystemExit: the caller decides what it means
            self._grids.put(error)

    def _simulate(self, path: Path) -> None:
        from flwr.serverapp import ServerApp
        from flwr.simulation import run_simulation

        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            self._grids.put(grid)
            self._stop.wait()

        nodes = client_app(functools.partial(_read, str(path)))
        resources: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        run_simulation(app, nodes, self.nodes, backend_config=resources)


def _init_ray(workers: int) -> None:
    """Start Ray on this machine alone, as quietly as it gets.

    Raises:
        Exception: it does not start, twice.
    """
    import ray

    if ray.is_initialized():
        return
    for attempt in range(ATTEMPTS):
        try:
            ray.init(
                num_cpus=workers,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
            )
        except Exception:  # Ray raises that class itself
            ray.shutdown()
            if attempt + 1 == ATTEMPTS:
                raise
        else:
            return


def _save(federation: Federation, path: Path) -> None:
    """Models and data in torch's file format, in which each storage stands once."""
    from ray import cloudpickle

    try:
        torch.save(federation, path, pickle_module=cloudpickle)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"engine=flower cannot send model, loss or data to its workers: {text}") from error


def _read(path: str, context: Context) -> Federation:
    """The federation that ``_save`` wrote, read once a process."""
    return _cached(path)


@functools.lru_cache(maxsize=1)
def _cached(path: str) -> Federation:
    # Written by this very program: pickled objects are its own. Storages are mapped, so workers share their pages.
    federation: Federation = torch.load(path, mmap=True, weights_only=False)
    torch.set_num_threads(federation.threads)
    return federation
