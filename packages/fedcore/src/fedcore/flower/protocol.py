"""What server and nodes say to each other: one order a node and round, one answer.

An order carries everything that a client needs beyond its own data: the parameters and the message that the algorithm
made for it, buffers, what is added to its frozen weights, the plan of its batches, and its state unless its node has
that. Nothing is computed from settings of the node, so that both sides cannot disagree silently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedcore.algorithm import Algorithm, Client, Context, Tree
from fedcore.flower.records import Encoder, to_tree
from fedcore.sampling import LocalPlan

__all__ = ["Answer", "Order", "ProtocolError", "Task", "algorithm_name", "head_of", "plain"]

SCHEMA_VERSION = 1
HEAD = "fedcore"
"""record with the numbers of an order or an answer"""
_CONTEXT = ("round", "rounds", "num_clients", "cohort", "lr", "last_lr", "max_steps")
_PLAN = ("batch_size", "local_epochs", "max_steps", "shuffle", "seed", "exact")


class ProtocolError(RuntimeError):
    """A message that is not one of ours, or of a newer version."""


@dataclass
class Task:
    """One client of an order.

    Args:
        client: whom to train.
        params: (P_k,) parameters that it is sent.
        message: of the algorithm.
        shift: added to frozen weights, by name.
        state: its state; None where its node has it under ``tag``, or where it takes part for the first time.
        tag: version of the state that the node should have; empty where it is sent, or where there is none yet.
    """

    client: Client
    params: Tensor
    message: Tree
    shift: Tree = field(default_factory=dict)
    state: Tree | None = None
    tag: str = ""


@dataclass
class Order:
    """A round's work of one node.

    Args:
        algorithm: see ``algorithm_name``; the node must run the same.
        ctx: public numbers of the round.
        plan: batches and seeds.
        threads: intra-op threads of a client's computing.
        tag: version under which new states are kept.
        buffers: of the global model.
        tasks: clients.
    """

    algorithm: str
    ctx: Context
    plan: LocalPlan
    threads: int
    tag: str
    buffers: Tree
    tasks: Sequence[Task]

    def to_content(self, encoder: Encoder) -> RecordDict:
        """The content of a message."""
        head: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "algorithm": self.algorithm, "tag": self.tag}
        head |= {f"ctx.{name}": getattr(self.ctx, name) for name in _CONTEXT}
        head |= {f"plan.{name}": getattr(self.plan, name) for name in _PLAN}
        head |= {"threads": self.threads}
        clients = [task.client for task in self.tasks]
        head |= {name: [int(getattr(c, name)) for c in clients] for name in ("id", "samples", "steps", "rank")}
        head |= {"tags": [task.tag for task in self.tasks], "states": [task.state is not None for task in self.tasks]}
        content = RecordDict({HEAD: ConfigRecord(head)})
        _put(content, encoder, "buffers", self.buffers)
        for task in self.tasks:
            content[f"{task.client.id}.params"] = encoder.record({"": task.params})
            _put(content, encoder, f"{task.client.id}.message", task.message)
            _put(content, encoder, f"{task.client.id}.shift", task.shift)
            _put(content, encoder, f"{task.client.id}.state", task.state or {})
        return content

    @classmethod
    def from_content(cls, content: RecordDict, device: torch.device | str = "cpu") -> Order:
        """The order of a message.

        Raises:
            ProtocolError: not an order, or of a newer version.
        """
        head = head_of(content)
        ctx = Context(steps=0, **{name: head[f"ctx.{name}"] for name in _CONTEXT})
        plan = LocalPlan(**{name: head[f"plan.{name}"] for name in _PLAN})
        tasks = []
        columns = (head[name] for name in ("id", "samples", "steps", "rank", "tags", "states"))
        for id, samples, steps, rank, tag, sent in zip(*columns, strict=True):
            tree = {part: _get(content, f"{id}.{part}", device) for part in ("params", "message", "shift", "state")}
            state = tree["state"] if sent else None
            client = Client(id, samples, steps, rank)
            tasks.append(Task(client, tree["params"][""], tree["message"], tree["shift"], state, tag))
        buffers = _get(content, "buffers", device)
        return cls(head["algorithm"], ctx, plan, head["threads"], head["tag"], buffers, tasks)


@dataclass
class Answer:
    """What a node found for one client.

    Args:
        upload: as it travels, before ``Algorithm.decode``.
        state: the client's new state, for the server's checkpoints; the node keeps it too.
        buffers: of its model.
        loss: mean training loss.
        up_bytes: size of upload and buffers.
        down_bytes: size of what the client was sent.
        error: why there is no upload.
    """

    upload: Tree = field(default_factory=dict)
    state: Tree = field(default_factory=dict)
    buffers: Tree = field(default_factory=dict)
    loss: float = math.nan
    up_bytes: int = 0
    down_bytes: int = 0
    error: str = ""

    @staticmethod
    def to_content(answers: Mapping[int, Answer]) -> RecordDict:
        """The content of a reply with the answers of some clients."""
        found = list(answers.values())
        head: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "id": list(answers)}
        head |= {name: [getattr(a, name) for a in found] for name in ("loss", "up_bytes", "down_bytes", "error")}
        content = RecordDict({HEAD: ConfigRecord(head)})
        encoder = Encoder()
        for id, answer in answers.items():
            for part in ("upload", "state", "buffers"):
                _put(content, encoder, f"{id}.{part}", getattr(answer, part))
        return content

    @staticmethod
    def clients(content: RecordDict) -> list[int]:
        """Ids of the clients in a reply.

        Raises:
            ProtocolError: not an answer, or of a newer version.
        """
        return [int(id) for id in head_of(content)["id"]]

    @classmethod
    def take(cls, content: RecordDict, id: int, device: torch.device | str = "cpu") -> Answer:
        """The answer of one client; its tensors are taken out of ``content``."""
        head = head_of(content)
        index = list(head["id"]).index(id)
        numbers: Any = {name: head[name][index] for name in ("loss", "up_bytes", "down_bytes", "error")}
        trees: Any = {part: _get(content, f"{id}.{part}", device) for part in ("upload", "state", "buffers")}
        for part in trees:
            content.pop(f"{id}.{part}", None)
        return cls(**trees, **numbers)


def algorithm_name(algorithm: Algorithm) -> str:
    """Name and options of an algorithm: the server's and the nodes' must be equal."""
    return repr(algorithm)


def plain(numbers: Mapping[str, Any]) -> RecordDict:
    """The content of a message that carries no tensors."""
    return RecordDict({HEAD: ConfigRecord({"schema_version": SCHEMA_VERSION, **numbers})})


def head_of(content: RecordDict) -> Mapping[str, Any]:
    """The numbers of a message.

    Raises:
        ProtocolError: not a message of ours, or of a newer version.
    """
    head = content.get(HEAD)
    if not isinstance(head, ConfigRecord) or "schema_version" not in head:
        raise ProtocolError("not a message of fedcore; the server and all nodes must run the same app")
    version = head["schema_version"]
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ProtocolError(f"message of schema version {version!r}; update polymodal-fedcore on the receiving side")
    return head


def _put(content: RecordDict, encoder: Encoder, name: str, tree: Tree) -> None:
    if tree:
        content[name] = encoder.record(tree)


def _get(content: RecordDict, name: str, device: torch.device | str) -> Tree:
    record = content.get(name)
    return to_tree(record if isinstance(record, ArrayRecord) else None, device)
