"""One client after the other on one model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from fedcore.engines.base import ClientResult, Engine, RoundWork, threads, train_client

__all__ = ["SerialEngine"]


class SerialEngine(Engine):
    """The default and the reference of all others: one model, flat vectors, index batches."""

    name: ClassVar[str] = "serial"

    def run(self, work: RoundWork) -> Iterator[ClientResult]:
        """Train the clients in order; each result is handed on before the next client starts."""
        for client in work.clients:
            with threads(self.federation.threads):
                result = train_client(self.federation, work, client, work.states(client.id))
            yield result
