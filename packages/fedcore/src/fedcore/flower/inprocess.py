"""Flower nodes inside this process: messages become bytes and are read again, and nothing else runs. For trials."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["InProcessGrid"]

_CLIENT_FAILED = 2
"""Flower's code of an error that a client app raised"""


class InProcessGrid(Grid):
    """A grid of nodes that train one after the other in this process.

    Every message and reply goes through Flower's serialisation, and every node has its own ``Context``, as behind a
    SuperLink; node ids are random.

    Args:
        app: client app of all nodes.
        nodes: how many; they get the partitions 0 to nodes - 1.
        run_config: of the contexts.

    Attributes:
        contexts: by node id.
        offline: node ids that are not there.
        before: called with every message that a node is about to get; what it raises is the node's failure.
    """

    def __init__(self, app: ClientApp, nodes: int, run_config: dict[str, Any] | None = None) -> None:
        self.app = app
        self.offline: set[int] = set()
        self.before: Callable[[Message], None] = lambda message: None
        self._run = Run.create_empty(run_id=secrets.randbits(32))
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, self._run.run_id, 1
        self.contexts: dict[int, Context] = {}
        for partition in range(nodes):
            config: dict[str, Any] = {"partition-id": partition, "num-partitions": nodes}
            node = secrets.randbits(62) + 2
            self.contexts[node] = Context(self._run.run_id, node, config, RecordDict(), dict(run_config or {}))
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As ``Message(...)``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are there."""
        return [node for node in self.contexts if node not in self.offline]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the nodes answer."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            ids.append(message.metadata.message_id)
            reply = self._answered(message)
            if reply is not None:
                self._replies[message.metadata.message_id] = reply
        return ids

    def _answered(self, message: Message) -> Message | None:
        received = _through_bytes(message)
        received.metadata.__dict__["_message_id"] = message.metadata.message_id
        node = message.metadata.dst_node_id
        try:
            self.before(received)
            if node in self.offline:
                return None
            return _through_bytes(self.app(received, self.contexts[node]))
        except Exception as error:  # as a node reports whatever its app raises
            return Message(Error(_CLIENT_FAILED, f"{type(error)}:<'{error}'>"), reply_to=received)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies, the last first: whoever sums must not rely on their order."""
        return [self._replies.pop(id) for id in reversed(list(message_ids)) if id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies; a node that is not there gives none."""
        return self.pull_messages(self.push_messages(messages))


def _through_bytes(message: Message) -> Message:
    objects = get_all_nested_objects(message)
    contents = {id: found.deflate() for id, found in objects.items()}
    made: Any = inflate_object_from_contents(message.object_id, contents)
    return made  # type: ignore[no-any-return]
