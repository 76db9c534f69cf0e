"""The node's side: train the clients of an order with the same function as every other engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedcore.algorithm import Algorithm, Client, Tree
from fedcore.batches import ClientData
from fedcore.engines.base import Federation, RoundWork, threads, train_client
from fedcore.flower.protocol import Answer, Order, Task, algorithm_name, plain
from fedcore.flower.records import to_record, to_tree

__all__ = ["STATES", "client_app", "partition_of", "train_order"]

STATES = "fedcore.states"
"""record of a node's context with the version of each client's state"""


def client_app(make: Callable[[Context], Federation], mods: list[Any] | None = None) -> ClientApp:
    """A Flower client app that trains clients of a federation.

    A node is started with ``--node-config 'partition-id=0 num-partitions=2'`` and hosts the clients whose number is
    ``partition-id`` modulo ``num-partitions``, or those of its data where ``Federation.data`` is a mapping by id.

    Args:
        make: gives the node's models and data, from Flower's context. It is called for every message, in a process of
            its own under ``flower-supernode``; keep what it made (``functools.cache``) for simulations. Only plan and
            seeds of the federation are the server's, not its own.
        mods: Flower's mods for both functions.
    """
    app = ClientApp(mods=mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(train_order(message.content, context, make(context)), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(_hosted(context, make(context)), reply_to=message)

    return app


def partition_of(context: Context) -> tuple[int, int]:
    """``partition-id`` and ``num-partitions`` of a node.

    Raises:
        ValueError: a node that was started without them, or with a partition that is not there.
    """
    config = context.node_config
    try:
        index, count = int(cast(int, config["partition-id"])), int(cast(int, config["num-partitions"]))
    except (KeyError, ValueError) as error:
        text = "start the SuperNode with --node-config 'partition-id=0 num-partitions=2'"
        raise ValueError(f"the node does not know its partition; {text}") from error
    if not 0 <= index < count:
        raise ValueError(f"partition-id={index}; expected 0..{count - 1}, below num-partitions")
    return index, count


def _hosted(context: Context, federation: Federation) -> RecordDict:
    """The clients of this node and their sizes."""
    index, count = partition_of(context)
    data: Any = federation.data
    ids = sorted(data) if isinstance(data, Mapping) else list(range(index, len(data), count))
    return plain({"partition": index, "partitions": count, "id": ids, "samples": [len(data[i]) for i in ids]})


# ------------------------------------------------------------------ training


def train_order(content: RecordDict, context: Context, federation: Federation) -> RecordDict:
    """Train the clients of an order; a client that fails answers with its error.

    Args:
        content: of the message.
        context: of the node; new states of clients are kept in it.
        federation: models and data of the node.

    Raises:
        ProtocolError: a message of something else.
    """
    device = next(iter(federation.learners.values())).device
    order = Order.from_content(content, device)
    return Answer.to_content({task.client.id: _answer(order, task, context, federation) for task in order.tasks})


def _answer(order: Order, task: Task, context: Context, federation: Federation) -> Answer:
    client = task.client
    state = task.state
    if state is None and task.tag:
        state = _kept(context, client.id, task.tag, task.params.device)
        if state is None:
            return Answer(error=f"node {context.node_id} has lost the state of client {client.id}")
    problem = _disagreement(order, client, federation)
    if problem:
        return Answer(error=problem)
    here = _for_client(federation, order, client)
    relay: Any = _Relay(task)
    work = RoundWork(relay, {}, task.params, order.buffers, order.ctx, [client], lambda _: state)
    with threads(order.threads):
        result = train_client(here, work, client, state)
    if result.error:
        return Answer(error=result.error, up_bytes=result.up_bytes, down_bytes=result.down_bytes)
    _keep(context, client.id, order.tag, result.state)
    numbers = (result.loss, result.up_bytes, result.down_bytes)
    return Answer(result.upload, result.state, result.buffers, *numbers)


@dataclass
class _Relay:
    """Stands for the server's algorithm: what it made for this client was received."""

    task: Task

    def broadcast(self, *_: object) -> tuple[Any, Tree]:
        """Parameters and message."""
        return self.task.params, self.task.message

    def base_shift(self, *_: object) -> Tree:
        """What is added to frozen weights."""
        return self.task.shift


def _disagreement(order: Order, client: Client, federation: Federation) -> str:
    """What server and node would do differently; empty where nothing."""
    algorithm, data = federation.algorithms.get(client.rank), federation.data
    if algorithm is None:
        return f"the node has no model of rank {client.rank}"
    if algorithm_name(algorithm) != order.algorithm:
        return f"the node runs {algorithm_name(algorithm)}, the server {order.algorithm}"
    try:
        samples = len(data[client.id])
    except (KeyError, IndexError):
        return f"the node has no data of client {client.id}"
    if samples != client.samples:
        return f"client {client.id} has {samples} samples here, {client.samples} on the server"
    return ""


def _for_client(federation: Federation, order: Order, client: Client) -> Federation:
    """The federation with the server's plan, and an algorithm whose upload stays as it travels."""
    algorithm: Algorithm = copy.copy(federation.algorithms[client.rank])
    object.__setattr__(algorithm, "decode", _as_it_is)  # the dataclass is frozen
    data: Any = {client.id: federation.data[client.id]}
    return replace(federation, algorithms={client.rank: algorithm}, plan=order.plan, data=cast(list[ClientData], data))


def _as_it_is(upload: Tree) -> Tree:
    return upload


# ------------------------------------------------------------------ states in the node's context


def _kept(context: Context, client: int, tag: str, device: torch.device) -> Tree | None:
    versions = context.state.get(STATES)
    if not isinstance(versions, ConfigRecord) or versions.get(str(client)) != tag:
        return None
    record = context.state.get(f"{STATES}.{client}")
    return to_tree(record, device) if isinstance(record, ArrayRecord) else {}


def _keep(context: Context, client: int, tag: str, state: Tree) -> None:
    if not state:
        return
    versions = context.state.get(STATES)
    if not isinstance(versions, ConfigRecord):
        versions = context.state[STATES] = ConfigRecord()
    versions[str(client)] = tag
    context.state[f"{STATES}.{client}"] = to_record(state)
