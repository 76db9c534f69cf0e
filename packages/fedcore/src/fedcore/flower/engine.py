"""The engine that trains clients on the nodes of a Flower grid; bit-equal to ``serial``."""

from __future__ import annotations

import logging
import secrets
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from flwr.app import MessageType, RecordDict
from polymodal.errors import UserError

from fedcore.algorithm import Client
from fedcore.engines.base import ClientResult, Engine, Federation, RoundWork, problem_of
from fedcore.flower.nodes import Nodes
from fedcore.flower.protocol import Answer, Order, ProtocolError, Task, algorithm_name
from fedcore.flower.records import Encoder

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from fedcore.simulation import Simulation

__all__ = ["FlowerEngine", "attach", "engine_of", "on"]

log = logging.getLogger(__name__)
TIMEOUT = 3600.0
"""seconds that a round waits for its nodes"""
_GRIDS: weakref.WeakKeyDictionary[Simulation, tuple[Nodes, float | None]] = weakref.WeakKeyDictionary()
_AMBIENT: list[tuple[Nodes, float | None]] = []


class FlowerEngine(Engine):
    """One message a node and round; replies are put in the order of clients before they are summed.

    Every node gets what the algorithm made for its clients and answers with their uploads. Clients whose node is not
    there, fails, or does not answer in time are dropped from the round; a private mechanism counts them as zero.

    **State.** A client's state stays in its node's ``Context``, and is not sent down again. Its copy travels up with
    the upload (its bytes are not counted in ``comm/``): checkpoints are complete, a round that fails leaves states as
    they were, and a client can go on at another node. The server's copy decides: it is sent down wherever the node
    may have another one, after a resume, a failed round or a lost answer.

    Args:
        federation: of the server; its algorithms decode uploads, its plan is sent to the nodes.
        nodes: who hosts whom.
        timeout: seconds that a round waits (None: as long as it takes; Flower reports a dead node after a minute).
        on_close: called by ``close``.
    """

    name: ClassVar[str] = "flower"

    def __init__(
        self,
        federation: Federation,
        nodes: Nodes,
        timeout: float | None = TIMEOUT,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(federation)
        if timeout is not None and timeout <= 0:
            raise UserError(f"timeout={timeout}; expected more than 0 seconds")
        self.nodes, self.timeout, self._on_close = nodes, timeout, on_close
        self._nonce = secrets.token_hex(4)
        self._there: dict[int, tuple[int, str, int]] = {}
        """client -> node, version and round of the state that is in the node's context"""

    # ------------------------------------------------------------------ a round

    def run(self, work: RoundWork) -> Iterator[ClientResult]:
        """Results in the order of ``work.clients``."""
        if not work.clients:
            return
        # A state of this round or a later one comes from a round that was given up.
        self._there = {c: known for c, known in self._there.items() if known[2] < work.ctx.round}
        self.nodes.refresh()
        tag = f"{self._nonce}.{work.ctx.round}"
        hosts = {client.id: self.nodes.host(client.id) for client in work.clients}
        found, errors = self._exchange(work, hosts, tag)
        for client in work.clients:
            host = hosts[client.id]
            if client.id in found:
                result = self._result(client, found.pop(client.id), work)
            elif host is None:
                result = ClientResult(client, error=f"no connected node hosts client {client.id}")
            else:
                text = errors.get(host, "its answer leaves the client out")
                result = ClientResult(client, error=f"node {host}: {text}")
            self._remember(result, host, tag, work)
            yield result

    def close(self) -> None:
        """Forget what nodes have; end what was started for this engine."""
        self._there.clear()
        if self._on_close is not None:
            self._on_close()

    def _exchange(
        self, work: RoundWork, hosts: dict[int, int | None], tag: str
    ) -> tuple[dict[int, RecordDict], dict[int, str]]:
        """Send the orders, wait; contents by client, errors by node."""
        encoder, contents = Encoder(), {}
        asked = {client: host for client, host in hosts.items() if host is not None}
        for node in sorted(set(asked.values())):
            tasks = [self._task(work, client, node) for client in work.clients if hosts[client.id] == node]
            name, plan, threads = algorithm_name(work.algorithm), self.federation.plan, self.federation.threads
            order = Order(name, work.ctx, plan, threads, tag, work.buffers, tasks)
            contents[node] = order.to_content(encoder)
        replies, errors = self.nodes.exchange(contents, MessageType.TRAIN, self.timeout, str(work.ctx.round))
        found: dict[int, RecordDict] = {}
        for node, content in replies.items():
            try:
                found |= {id: content for id in Answer.clients(content) if asked.get(id) == node}
            except ProtocolError as error:
                errors[node] = str(error)
        return found, errors

    def _task(self, work: RoundWork, client: Client, node: int) -> Task:
        """What the algorithm makes for a client, as the serial engine has it made."""
        algorithm, ctx = work.algorithm, replace(work.ctx, steps=client.steps)
        params, message = algorithm.broadcast(work.server, work.params, ctx, client)
        shift = algorithm.base_shift(work.server, work.params, ctx, client) if algorithm.shifts_base else {}
        known = self._there.get(client.id)
        if known is not None and known[0] == node:
            return Task(client, params, message, shift, tag=known[1])
        return Task(client, params, message, shift, state=work.states(client.id))

    def _result(self, client: Client, content: RecordDict, work: RoundWork) -> ClientResult:
        """The result in a reply; what cannot be read drops the client."""
        try:
            answer = Answer.take(content, client.id, work.params.device)
            if answer.error:
                return ClientResult(client, error=answer.error, up_bytes=answer.up_bytes, down_bytes=answer.down_bytes)
            upload = self.federation.algorithms[client.rank].decode(answer.upload)
            error = problem_of(upload)
        except Exception as failure:  # a reply comes from another machine: whatever is wrong with it drops its client
            text = f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300]
            return ClientResult(client, error=f"its answer cannot be used: {text}")
        numbers: Any = (answer.loss, answer.up_bytes, answer.down_bytes, error)
        return ClientResult(client, upload, answer.state, answer.buffers, *numbers)

    def _remember(self, result: ClientResult, host: int | None, tag: str, work: RoundWork) -> None:
        """Which version of the client's state its node has now."""
        if result.error or host is None:
            self._there.pop(result.client.id, None)
        elif result.state:
            self._there[result.client.id] = (host, tag, work.ctx.round)


# ------------------------------------------------------------------ simulations and their grids


def attach(simulation: Simulation, nodes: Nodes | Grid, timeout: float | None = TIMEOUT) -> Simulation:
    """Let the rounds of a simulation run on the nodes of a grid; returns the simulation.

    Args:
        simulation: of the server.
        nodes: the grid that Flower gave to the server app, or its ``Nodes``.
        timeout: seconds that a round waits for its nodes.
    """
    simulation.close()
    simulation.engine = FlowerEngine.name
    _GRIDS[simulation] = (nodes if isinstance(nodes, Nodes) else Nodes(nodes), timeout)
    return simulation


@contextmanager
def on(nodes: Nodes, timeout: float | None = TIMEOUT) -> Iterator[None]:
    """Simulations with ``engine="flower"`` that run their first round meanwhile do so on these nodes."""
    _AMBIENT.append((nodes, timeout))
    try:
        yield
    finally:
        _AMBIENT.pop()


def engine_of(simulation: Simulation) -> FlowerEngine:
    """The engine of a simulation: on the grid that was attached, else on Flower's simulation on this machine.

    Raises:
        UserError: a model, a loss or data that cannot be sent to other processes.
    """
    place = _GRIDS.get(simulation) or (_AMBIENT[-1] if _AMBIENT else None)
    if place is not None:
        return FlowerEngine(simulation.federation, *place)
    from fedcore.flower.local import start

    return start(simulation)
