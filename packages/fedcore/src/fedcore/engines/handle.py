"""A worker process as its parent sees it."""

from __future__ import annotations

import contextlib
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle

from fedcore.engines.segments import Segment
from fedcore.engines.worker import Reply

__all__ = ["Handle"]


class Handle:
    """A worker process as the parent sees it."""

    def __init__(self, started: tuple[BaseProcess, Connection]) -> None:
        self.process, self.connection = started
        self.position: int | None = None
        self.common: Segment | None = None
        self.state: Segment | None = None
        self.segments: dict[int, Segment] = {}
        self.freed: list[int] = []

    def receive(self) -> Reply:
        """The next reply; its segment is mapped afterwards."""
        if not self.connection.poll():  # the process has ended, though something it started holds the line
            raise EOFError
        reply: Reply = self.connection.recv()
        if reply.size:
            segment = Segment(reply.size, recv_handle(self.connection))
            segment.seal()
            self.segments[reply.segment] = segment
        return reply

    def end(self) -> None:
        """End the process, whatever it does."""
        if self.position is not None:
            self.process.kill()
        else:
            with contextlib.suppress(OSError):  # it has gone already
                self.connection.send(None)
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()
