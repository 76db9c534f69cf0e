"""Clients in worker processes: ids out, uploads and states back through shared memory, in client-id order."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import sys
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import connection as mpc
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import send_handle
from typing import Any, ClassVar

import torch
from polymodal.errors import UserError

from fedcore.algorithm import Algorithm, Client, Tree
from fedcore.engines.base import ClientResult, Engine, Federation, RoundWork
from fedcore.engines.handle import Handle
from fedcore.engines.segments import Layout, Segment, layout_of, read, write
from fedcore.engines.worker import Order, Reply, main

__all__ = ["PoolEngine"]

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""A client whose worker dies so many times is dropped."""
WAITING_BYTES = 256 * 2**20
"""Finished uploads may wait for those of smaller ids up to this size; then clients are started in order of ids."""
WAITING_CLIENTS = 64
"""The same for their number: each of them takes a file descriptor."""


class PoolEngine(Engine):
    """Worker processes with ``federation.threads`` intra-op threads each; bit-equal to ``serial``.

    A worker trains one client after the other. Long clients start first; results are handed on in the order of ids.
    Processes begin with the first round and share the data sets with this one where the platform forks. A worker that
    is killed is replaced and its client repeated.

    Args:
        federation: models, data, algorithms; on the CPU.
        workers: processes (default: one a core), at most one a client of a round.

    Raises:
        UserError: a model on an accelerator, a platform without Unix sockets, fewer than one worker.
    """

    name: ClassVar[str] = "pool"

    def __init__(self, federation: Federation, workers: int | None = None) -> None:
        super().__init__(federation)
        if workers is not None and workers < 1:
            raise UserError(f"workers={workers}; expected at least 1")
        if sys.platform == "win32":
            raise UserError("engine=pool needs Unix; use engine=serial")
        if any(learner.device.type != "cpu" for learner in federation.learners.values()):
            raise UserError("engine=pool runs on the CPU; use engine=serial or batched for a model on an accelerator")
        self._limit = workers or _cores()
        self._algorithm: Algorithm | None = None
        self._workers: list[Handle] = []
        self._common: Segment | None = None
        self._end = weakref.finalize(self, _end, self._workers)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid or 0 for worker in self._workers]

    @property
    def _busy(self) -> bool:
        return any(worker.position is not None for worker in self._workers)

    def run(self, work: RoundWork) -> Iterator[ClientResult]:
        """Results in the order of ``work.clients``; uploads and buffers are valid until the next one is asked for."""
        if work.algorithm is not self._algorithm or self._busy:
            self.close()
            self._algorithm = work.algorithm
        while len(self._workers) < min(self._limit, len(work.clients)):
            self._workers.append(Handle(self._start()))
        turn = _Round(work, self._publish(work))
        try:
            for position in range(len(work.clients)):
                while position not in turn.done:
                    self._hand_out(turn, position)
                    self._collect(turn)
                self._hand_out(turn, position)
                done = turn.take(position)
                yield done.result
                done.release()
        finally:
            if self._busy:  # given up in the middle
                self.close()

    def close(self) -> None:
        """End all workers and give their memory back."""
        _end(self._workers)
        self._common = None

    # ------------------------------------------------------------------ orders

    def _publish(self, work: RoundWork) -> Layout:
        """Write what all clients of a round are sent."""
        trees: list[Tree] = [work.server, {"": work.params}, work.buffers]
        layout, size = layout_of(trees)
        if self._common is None or self._common.size < size:
            self._common = Segment(size)
        write(self._common, layout, trees)
        return layout

    def _hand_out(self, turn: _Round, position: int) -> None:
        """Give idle workers clients, unless too much waits already; ``position`` is needed next."""
        for index, worker in enumerate(self._workers):
            while worker.position is None:
                chosen = turn.choose(position)
                if chosen is None:
                    return
                try:
                    self._send(worker, turn, chosen)
                except ConnectionError:  # it died while it had nothing to do
                    turn.queue.insert(0, chosen)
                    worker = self._replace(index)

    def _send(self, worker: Handle, turn: _Round, position: int) -> None:
        client = turn.work.clients[position]
        state = turn.work.states(client.id)
        layout, state_size = None, 0
        if state is not None:
            layout, size = layout_of([state])
            if worker.state is None or worker.state.size < size:
                worker.state = Segment(size)
                state_size = worker.state.size
            write(worker.state, layout, [state])
        assert self._common is not None
        common_size = 0 if worker.common is self._common else self._common.size
        freed, worker.freed = tuple(worker.freed), []
        worker.connection.send(Order(client, turn.work.ctx, turn.common, common_size, layout, state_size, freed))
        pid = worker.process.pid or 0
        if common_size:
            send_handle(worker.connection, self._common.descriptor, pid)
            worker.common = self._common
        if state_size and worker.state is not None:
            send_handle(worker.connection, worker.state.descriptor, pid)
            worker.state.seal()
        worker.position = position

    # ------------------------------------------------------------------ replies

    def _collect(self, turn: _Round) -> None:
        """Wait for at least one worker; take its result, or replace it."""
        watched: dict[Any, int] = {}
        for index, worker in enumerate(self._workers):
            if worker.position is not None:
                watched |= {worker.connection: index, worker.process.sentinel: index}
        for index in {watched[ready] for ready in mpc.wait(list(watched))}:
            worker = self._workers[index]
            try:
                turn.put(worker, worker.receive())
            except (EOFError, OSError, RuntimeError, pickle.UnpicklingError):  # it died, perhaps in mid-sentence
                self._repeat(turn, index)

    def _repeat(self, turn: _Round, index: int) -> None:
        """Put the client of a worker that died back into the queue, or give it up."""
        worker = self._workers[index]
        position = worker.position
        assert position is not None
        self._replace(index)
        turn.deaths[position] = turn.deaths.get(position, 0) + 1
        client = turn.work.clients[position]
        if turn.deaths[position] < ATTEMPTS:
            turn.queue.insert(0, position)
            return
        turn.done[position] = _Done(ClientResult(client, error=f"its worker process died {ATTEMPTS} times"))

    # ------------------------------------------------------------------ processes

    def _replace(self, index: int) -> Handle:
        old = self._workers[index]
        old.end()
        log.warning("worker %s died (exit code %s); another one takes over", old.process.pid, old.process.exitcode)
        self._workers[index] = Handle(self._start())
        return self._workers[index]

    def _start(self) -> tuple[BaseProcess, Connection]:
        """A new worker process and the way to talk to it."""
        fork = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
        context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        inherited = (self.federation, self._algorithm) if fork else self._pickled()
        here, there = context.Pipe()
        arguments = (there, inherited, os.getpid())
        process = context.Process(target=main, args=arguments, daemon=True, name="fedcore-worker")
        with warnings.catch_warnings():  # one thread goes on in the child, and it takes no lock of the others
            warnings.filterwarnings("ignore", r"This process .* is multi-threaded", DeprecationWarning)
            process.start()
        there.close()
        return process, here

    def _pickled(self) -> bytes:
        # Plain pickle on purpose: multiprocessing's own would share the memory of buffers between the workers, and
        # needs a file descriptor for every tensor of the data.
        try:
            return pickle.dumps((self.federation, self._algorithm))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            text = " ".join(str(error).split())
            raise UserError(f"engine=pool cannot send model, loss or data to its workers: {text}") from error


@dataclass
class _Done:
    """A result that waits for its turn, and whose memory it lies in."""

    result: ClientResult
    worker: Handle | None = None
    segment: int = 0
    size: int = 0

    def release(self) -> None:
        """Let the worker use the memory again."""
        if self.worker is not None:
            self.worker.freed.append(self.segment)


@dataclass
class _Round:
    """Who waits, who is done."""

    work: RoundWork
    common: Layout
    queue: list[int] = field(default_factory=list)
    done: dict[int, _Done] = field(default_factory=dict)
    deaths: dict[int, int] = field(default_factory=dict)
    waiting: int = 0

    def __post_init__(self) -> None:
        # The longest first, so that none of them is left for the end, when the other workers have nothing to do.
        steps = [client.steps for client in self.work.clients]
        self.queue = sorted(range(len(steps)), key=lambda i: -steps[i])

    def choose(self, position: int) -> int | None:
        """The next client to start; None where there is none, or too much waits for ``position``."""
        if self.waiting <= WAITING_BYTES and len(self.done) <= WAITING_CLIENTS:
            return self.queue.pop(0) if self.queue else None
        if position not in self.queue:
            return None
        self.queue.remove(position)
        return position

    def put(self, worker: Handle, reply: Reply) -> None:
        """Keep the result of a worker, which is idle now."""
        position = worker.position
        assert position is not None
        worker.position = None
        segment = worker.segments.get(reply.segment)
        upload, state, buffers = read(segment, reply.layout, 3)
        # Kept beyond the client's turn: the new state until the round has ended well, and lists of uploads.
        state = {name: value.clone() for name, value in state.items()}
        if self.work.algorithm.reduction == "list":
            upload = {name: value.clone() for name, value in upload.items()}
        client: Client = self.work.clients[position]
        numbers = (reply.loss, reply.up_bytes, reply.down_bytes, reply.error)
        size = segment.size if segment is not None else 0
        self.done[position] = _Done(ClientResult(client, upload, state, buffers, *numbers), worker, reply.segment, size)
        self.waiting += size

    def take(self, position: int) -> _Done:
        """The result of a client."""
        done = self.done.pop(position)
        self.waiting -= done.size
        return done


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _end(workers: list[Handle]) -> None:
    """End all workers; those that are idle leave by themselves."""
    while workers:
        workers.pop().end()
