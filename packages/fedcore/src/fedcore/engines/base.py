"""What every engine does: take the clients of a round, return their uploads in client-id order."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from polymodal.seeding import generator
from torch import Tensor

from fedcore.algorithm import Algorithm, Client, Context, Step, Tree

if TYPE_CHECKING:
    from fedcore.batches import ClientData
    from fedcore.learner import Learner
    from fedcore.sampling import LocalPlan

__all__ = [
    "ClientResult",
    "Engine",
    "Federation",
    "RoundWork",
    "initial_state",
    "problem_of",
    "threads",
    "train_client",
    "tree_bytes",
]


@dataclass
class Federation:
    """What stays the same over rounds.

    Args:
        algorithms: by rank of the client's model (0 where ranks are not used), bound to that model's layout.
        learners: by rank.
        data: by client id.
        plan: batches and seeds.
        threads: intra-op threads of one client's computing, the same in every engine since results depend on it. More
            than one gains little for small models and loses much on a busy machine.
    """

    algorithms: dict[int, Algorithm]
    learners: dict[int, Learner]
    data: Sequence[ClientData]
    plan: LocalPlan
    threads: int = 1


@dataclass
class RoundWork:
    """One round, as every engine sees it.

    Args:
        algorithm: bound to the server's layout; makes the broadcasts.
        server: server state.
        params: (P,) global parameters.
        buffers: of the global model.
        ctx: public numbers; ``steps`` is filled in by client.
        clients: the cohort, ascending by id.
        states: client state by id, ``{}`` for algorithms without.
    """

    algorithm: Algorithm
    server: Tree
    params: Tensor
    buffers: Tree
    ctx: Context
    clients: Sequence[Client]
    states: Callable[[int], Tree | None]


@dataclass
class ClientResult:
    """What one client sent back, or why it sent nothing.

    Args:
        client: the client.
        upload: decoded upload; empty after a failure.
        state: the client's new state.
        buffers: of its model after training.
        loss: mean training loss over its steps.
        up_bytes: size of the upload as it travels, buffers included.
        down_bytes: size of what was sent to the client.
        error: why the client is dropped; empty where it is not.
    """

    client: Client
    upload: Tree = field(default_factory=dict)
    state: Tree = field(default_factory=dict)
    buffers: Tree = field(default_factory=dict)
    loss: float = math.nan
    up_bytes: int = 0
    down_bytes: int = 0
    error: str = ""


class Engine(ABC):
    """Runs the local training of a cohort.

    Args:
        federation: models, data, algorithm.
    """

    name: ClassVar[str] = ""
    exact: ClassVar[bool] = True
    """whether results are bit-equal to the serial engine's"""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation

    @abstractmethod
    def run(self, work: RoundWork) -> Iterator[ClientResult]:
        """Results of all clients of a round, in the order of ``work.clients``."""

    def close(self) -> None:  # noqa: B027 (most engines hold nothing)
        """Give back processes and memory; nothing for most."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with ``count`` intra-op threads, then with as many as before."""
    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)


def train_client(federation: Federation, work: RoundWork, client: Client, state: Tree | None) -> ClientResult:
    """Local training of one client: receive, start, K steps, upload. Failures are returned, not raised."""
    try:
        return _train(federation, work, client, state)
    except Exception as error:  # whatever a client's data or model raises drops this client, not the round
        return ClientResult(client, error=f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])


def _train(federation: Federation, work: RoundWork, client: Client, state: Tree | None) -> ClientResult:
    algorithm, learner = federation.algorithms[client.rank], federation.learners[client.rank]
    data, plan = federation.data[client.id], federation.plan
    if not client.steps:
        return ClientResult(client, error="no data")
    ctx = replace(work.ctx, steps=client.steps)
    if state is None:
        state = initial_state(algorithm, ctx, client, learner.device)
    received, message = work.algorithm.broadcast(work.server, work.params, ctx, client)
    if work.buffers:
        learner.load_buffers(work.buffers)
    if algorithm.shifts_base:
        learner.shift(work.algorithm.base_shift(work.server, work.params, ctx, client))
    order = plan.batches(ctx.round, client.id, len(data))
    full_grad = partial(learner.full_gradient, data=data, order=order)
    start, local = algorithm.local_init(received, message, state, ctx, full_grad)
    params, losses = start.clone(), torch.zeros((), dtype=torch.float64, device=start.device)
    seed = plan.rng(ctx.round, client.id)
    grad_fn = _WithLoss(learner, losses)
    for k, indices in enumerate(order):
        batch = data.batch(indices, generator(seed, "augment", k) if data.augments else None)
        step = Step(k, client.steps, ctx.round, ctx.lr, ctx.last_lr, (seed + k) % 2**63)
        params, local = algorithm.local_step(params, grad_fn, batch, local, step)
    upload, state = algorithm.local_finish(start, params, message, state, local, ctx)
    buffers = learner.buffers if work.buffers else {}
    sent, got = tree_bytes(upload) + tree_bytes(buffers), tree_bytes({**message, "": received}) + tree_bytes(buffers)
    decoded = algorithm.decode(upload)
    return ClientResult(
        client, decoded, state, buffers, float(losses) / client.steps, sent, got, error=problem_of(decoded)
    )


def initial_state(algorithm: Algorithm, ctx: Context, client: Client, device: torch.device) -> Tree:
    """State of a client that takes part for the first time, on the device of the model."""
    return {name: value.to(device) for name, value in algorithm.client_init(ctx, client).items()}


class _WithLoss:
    """A learner that adds up the losses of first calls; sharpness-aware second calls do not count."""

    def __init__(self, learner: Learner, total: Tensor) -> None:
        self._learner, self._total = learner, total
        self.missing: tuple[tuple[int, int], ...] = ()

    def __call__(self, params: Tensor, batch: Any, *, rng: int, update_buffers: bool = True) -> tuple[Tensor, Tensor]:
        grad, loss = self._learner(params, batch, rng=rng, update_buffers=update_buffers)
        self.missing = self._learner.missing
        if update_buffers:
            self._total += loss
        return grad, loss


def tree_bytes(tree: Tree) -> int:
    """Bytes of all tensors of a tree."""
    return sum(value.numel() * value.element_size() for value in tree.values())


def problem_of(upload: Tree) -> str:
    """Why an upload cannot be used; empty where it can."""
    for name, value in upload.items():
        # The sum is one pass without a temporary; it is not finite wherever an element is not.
        if value.is_floating_point() and not math.isfinite(float(value.sum())) and not bool(value.isfinite().all()):
            return f"{name} is not finite"
    return ""
