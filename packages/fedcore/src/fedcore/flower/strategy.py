"""A simulation behind Flower's own face: a ``Strategy`` whose rounds are those of the simulation."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedcore.flower.engine import attach
from fedcore.flower.nodes import Nodes
from fedcore.flower.records import to_record
from fedcore.simulation import Simulation

__all__ = ["FlowerStrategy"]

log = logging.getLogger(__name__)


class FlowerStrategy(Strategy):
    """Runs a simulation from ``strategy.start(grid, strategy.arrays(), num_rounds=...)``.

    Every round is ``simulation.round()``: it runs in a thread that hands its messages to Flower and gets the replies
    from it. Cohort, rates and timeouts of clients are the simulation's, so ``arrays`` and the configuration records of
    ``start`` are not read. After a round in which no client reported, its error is raised.

    Args:
        simulation: of the server; its state is the result.
    """

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self._nodes: _Handover | None = None
        self._round: threading.Thread | None = None
        self._outcome: dict[str, Any] = {}

    def arrays(self) -> ArrayRecord:
        """Global parameters by name, as they are evaluated."""
        return to_record(self.simulation.learner.spec.unflatten(self.simulation.evaluation_flat))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Start a round; its messages."""
        if self._nodes is None or self._nodes.grid is not grid:
            self._nodes = _Handover(grid)
            attach(self.simulation, self._nodes, None)
        self._outcome = {}
        self._nodes.messages, self._nodes.replies = queue.Queue(), queue.Queue()
        arguments = (self._nodes.messages, torch.get_num_threads())
        self._round = threading.Thread(target=self._run, args=arguments, daemon=True, name="fedcore-round")
        self._round.start()
        return self._nodes.messages.get()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """End the round; the new parameters and what it measured."""
        assert self._nodes is not None, "configure_train comes first"
        assert self._round is not None
        self._nodes.replies.put(list(replies))
        self._round.join()
        if "error" in self._outcome:
            raise self._outcome["error"]
        row: Any = {name: value for name, value in self._outcome["row"].items() if isinstance(value, int | float)}
        return self.arrays(), MetricRecord(row)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """None: the server evaluates, by ``evaluate_fn`` or ``simulation.evaluate``."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """None."""
        return None

    def summary(self) -> None:
        """Log what runs."""
        log.info("%s over %d clients", self.simulation.algorithm, self.simulation.num_clients)

    def _run(self, messages: queue.Queue[list[Message]], threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            self._outcome["row"] = self.simulation.round()
        except BaseException as error:  # raised again in Flower's thread
            self._outcome["error"] = error
        finally:
            messages.put([])  # a round that ended before it sent anything


class _Handover(Nodes):
    """Nodes whose training messages are sent by Flower's loop."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.messages: queue.Queue[list[Message]] = queue.Queue()
        self.replies: queue.Queue[list[Message]] = queue.Queue()

    def send(self, messages: list[Message], timeout: float | None) -> Iterable[Message]:
        """Queries go over the grid at once, training over Flower's loop."""
        if messages and messages[0].metadata.message_type == MessageType.TRAIN:
            self.messages.put(messages)
            return self.replies.get()
        return super().send(messages, timeout)
