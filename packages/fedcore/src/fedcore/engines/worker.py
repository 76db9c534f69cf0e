"""A worker process of the pool: receives client ids, trains, answers through shared memory."""

from __future__ import annotations

import gc
import pickle
import signal
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import TYPE_CHECKING, NamedTuple

import torch

from fedcore.algorithm import Client, Context, Tree
from fedcore.engines.base import ClientResult, Federation, RoundWork, train_client
from fedcore.engines.segments import Layout, Segment, layout_of, read, write

if TYPE_CHECKING:
    from fedcore.algorithm import Algorithm

__all__ = ["Order", "Reply", "main"]


class Order(NamedTuple):
    """What a worker is told: a client, and where its input lies.

    Args:
        client: whom to train.
        ctx: the round.
        common: places of server state, ``{"": parameters}`` and buffers.
        common_size: bytes of a new segment for these, whose descriptor follows; 0: where the last ones were.
        state: places of the client's state; None for a client without.
        state_size: as ``common_size``.
        freed: segments of this worker whose content was taken.
    """

    client: Client
    ctx: Context
    common: Layout
    common_size: int
    state: Layout | None
    state_size: int
    freed: tuple[int, ...]


class Reply(NamedTuple):
    """What a worker answers: a result whose tensors lie in one of its segments.

    Args:
        segment: number of the segment.
        size: its bytes, if it is new: the descriptor follows; 0: known.
        layout: places of upload, state and buffers.
        loss: as in ``ClientResult``.
        up_bytes: as in ``ClientResult``.
        down_bytes: as in ``ClientResult``.
        error: as in ``ClientResult``.
    """

    segment: int
    size: int
    layout: Layout
    loss: float
    up_bytes: int
    down_bytes: int
    error: str


class _Worker:
    """State of the process between orders."""

    def __init__(self, connection: Connection, federation: Federation, algorithm: Algorithm, parent: int) -> None:
        self.connection, self.federation, self.algorithm, self.parent = connection, federation, algorithm, parent
        self.common: Segment | None = None
        self.state: Segment | None = None
        self.segments: list[Segment] = []
        self.free: set[int] = set()

    def serve(self) -> None:
        """Follow orders until there is none."""
        while True:
            order = self.connection.recv()
            if order is None:
                return
            self.free.update(order.freed)
            if order.common_size:
                self.common = self._received(order.common_size)
            if order.state_size:
                self.state = self._received(order.state_size)
            self._answer(self._train(order))

    def _received(self, size: int) -> Segment:
        segment = Segment(size, recv_handle(self.connection))
        segment.seal()
        return segment

    def _train(self, order: Order) -> ClientResult:
        server, params, buffers = read(self.common, order.common, 3)
        state = None if order.state is None else read(self.state, order.state, 1)[0]
        work = RoundWork(self.algorithm, server, params[""], buffers, order.ctx, [order.client], lambda client: state)
        return train_client(self.federation, work, order.client, state)

    def _answer(self, result: ClientResult) -> None:
        trees: list[Tree] = [{}, {}, {}] if result.error else [result.upload, result.state, result.buffers]
        layout, size = layout_of(trees)
        number, fresh = self._room(size)
        segment = self.segments[number]
        write(segment, layout, trees)
        numbers = (result.loss, result.up_bytes, result.down_bytes, result.error)
        self.connection.send(Reply(number, segment.size if fresh else 0, layout, *numbers))
        if fresh:
            send_handle(self.connection, segment.descriptor, self.parent)
            segment.seal()

    def _room(self, size: int) -> tuple[int, bool]:
        """Number of a segment that is free and large enough, and whether it is new."""
        fitting = [n for n in self.free if self.segments[n].size >= size]
        if fitting:
            self.free.remove(fitting[0])
            return fitting[0], False
        if self.free:
            number = self.free.pop()
            self.segments[number] = Segment(size)
        else:
            number = len(self.segments)
            self.segments.append(Segment(size))
        return number, True


def main(connection: Connection, inherited: tuple[Federation, Algorithm] | bytes, parent: int) -> None:
    """Life of a worker.

    Args:
        connection: orders come, replies go.
        inherited: the federation and the algorithm bound to the server's layout; pickled where the process is no fork.
        parent: process id of the parent.
    """
    from polymodal.loading import end_with_parent

    gc.freeze()  # what was inherited stays as it is: its pages are shared with the parent as long as nobody writes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    federation, algorithm = pickle.loads(inherited) if isinstance(inherited, bytes) else inherited
    torch.set_num_threads(federation.threads)
    try:
        _Worker(connection, federation, algorithm, parent).serve()
    except (EOFError, ConnectionError):  # the parent has gone
        return
