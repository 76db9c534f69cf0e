"""Which node hosts which client. Node ids are random: every node is asked once."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flwr.app import Message, MessageType, RecordDict
from polymodal.errors import UserError

from fedcore.flower.protocol import ProtocolError, head_of, plain

if TYPE_CHECKING:
    from flwr.serverapp import Grid

__all__ = ["Nodes", "RemoteClient", "remote_clients"]

log = logging.getLogger(__name__)
AGAIN = 60.0
"""seconds after which a node that did not say what it hosts is asked again"""
QUERIES = 64
"""nodes that are asked at a time: Flower's stores look through all messages that wait"""


class Nodes:
    """The nodes of a grid and the clients that they host.

    Args:
        grid: Flower's grid.
        timeout: seconds to wait for a node to say what it hosts (None: as long as it takes).

    Attributes:
        samples: training samples of every client that a node has named.
    """

    def __init__(self, grid: Grid, timeout: float | None = 600) -> None:
        self.grid, self.timeout = grid, timeout
        self.samples: dict[int, int] = {}
        self._clients: dict[int, tuple[int, ...]] = {}
        self._online: set[int] = set()
        self._failed: set[int] = set()
        self._again: dict[int, float] = {}
        self._partitions = 0

    def refresh(self) -> None:
        """Note who is connected; ask the nodes that were not asked yet."""
        self._online = set(self.grid.get_node_ids())
        now = time.monotonic()
        new = [n for n in sorted(self._online - set(self._clients)) if self._again.get(n, now) <= now]
        for first in range(0, len(new), QUERIES):
            self._ask(new[first : first + QUERIES])

    def _ask(self, new: list[int]) -> None:
        found, errors = self.exchange({node: plain({}) for node in new}, MessageType.QUERY, self.timeout)
        for node, content in found.items():
            try:
                self._note(node, head_of(content))
            except ProtocolError as error:
                errors[node] = str(error)
        for node, text in errors.items():
            self._again[node] = time.monotonic() + AGAIN
            log.warning("node %s does not say what it hosts: %s", node, text)

    def exchange(
        self, contents: Mapping[int, RecordDict], kind: str, timeout: float | None, group: str = ""
    ) -> tuple[dict[int, RecordDict], dict[int, str]]:
        """Send every node its content, and wait.

        Args:
            contents: by node.
            kind: ``MessageType``.
            timeout: seconds.
            group: Flower's name for messages that belong together.

        Returns:
            Contents of the replies by node, and why there is none by node.
        """
        messages = [Message(content, node, kind, group_id=group) for node, content in contents.items()]
        replies = self.send(messages, timeout)
        # SuperLink itself answers for a node that has gone: a reply is known by the message, not by its sender.
        nodes = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        found: dict[int, RecordDict] = {}
        errors: dict[int, str] = {}
        for reply in replies:
            node = nodes.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
            if reply.has_error():
                errors[node] = _one_line(reply.error.reason)
            elif reply.has_content():
                found[node] = reply.content
        for node in contents:
            if node not in found:
                errors.setdefault(node, f"no answer within {timeout or 0:.0f} s")
        self._failed = (self._failed | set(errors)) - set(found)
        return found, errors

    def send(self, messages: list[Message], timeout: float | None) -> Iterable[Message]:
        """Replies to messages, in any order, some perhaps missing."""
        return self.grid.send_and_receive(messages, timeout=timeout) if messages else []

    def _note(self, node: int, head: Mapping[str, Any]) -> None:
        partitions, partition = int(head["partitions"]), int(head["partition"])
        if self._partitions and partitions != self._partitions:
            raise UserError(
                f"nodes disagree: num-partitions={partitions} and {self._partitions}; start all nodes with one"
            )
        self._partitions = partitions
        ids, samples = list(head["id"]), list(head["samples"])
        log.debug("node %s has partition %d of %d: %d clients", node, partition, partitions, len(ids))
        self._clients[node] = tuple(int(i) for i in ids)
        self.samples |= dict(zip(self._clients[node], (int(n) for n in samples), strict=True))

    def host(self, client: int) -> int | None:
        """The node that trains a client: of those that host it and are connected, one that answered last time."""
        hosts = [node for node, clients in self._clients.items() if client in clients and node in self._online]
        return min(hosts, key=lambda node: (node in self._failed, node), default=None)

    def wait(self, nodes: int, timeout: float = 600, poll: float = 1.0) -> None:
        """Wait until so many nodes have said what they host.

        Raises:
            UserError: they have not after ``timeout`` seconds.
        """
        end = time.monotonic() + timeout
        while True:
            self.refresh()
            there = sum(node in self._online for node in self._clients)
            if there >= nodes:
                return
            if time.monotonic() > end:
                raise UserError(
                    f"{there} of {nodes} nodes are connected after {timeout:.0f} s; start flower-supernode there"
                )
            time.sleep(poll)


class RemoteClient(Sequence[Any]):
    """Stands for a client's data on a server that has none: its size, and an example of a sample's shape.

    Args:
        samples: training samples on the node.
        example: a made-up or public sample, ``(input, target)``.
    """

    def __init__(self, samples: int, example: Any) -> None:
        self.samples, self.example = samples, example

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.samples:
            raise IndexError(index)
        return self.example

    def __iter__(self) -> Iterator[Any]:
        return (self.example for _ in range(self.samples))


def remote_clients(nodes: Nodes, example: Any) -> list[RemoteClient]:
    """Clients for the server's ``Simulation`` when the nodes alone have data, in the order of their numbers.

    Args:
        nodes: after ``wait``.
        example: a sample as the clients have them, for checking the model; of zeros, say.

    Raises:
        UserError: numbers of clients with a gap.
    """
    ids = sorted(nodes.samples)
    if ids != list(range(len(ids))):
        raise UserError(f"nodes host clients {ids[:10]}; expected numbers from 0 without a gap, so a node is missing")
    return [RemoteClient(nodes.samples[i], example) for i in ids]


def _one_line(text: str | None) -> str:
    return " ".join((text or "no reason given").split())[:300]
