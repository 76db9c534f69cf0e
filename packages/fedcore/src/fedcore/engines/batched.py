"""Many clients in one computation: stacked parameters, one call of the algorithm for all of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from polymodal.seeding import generator
from torch import Tensor

from fedcore.algorithm import Client, Local, Step, Tree
from fedcore.engines.base import (
    ClientResult,
    Engine,
    Federation,
    RoundWork,
    initial_state,
    threads,
    train_client,
    tree_bytes,
)
from fedcore.engines.serial import SerialEngine
from fedcore.engines.stacked_check import checked_gradient
from fedcore.engines.stacked_data import CannotStackError, StackedData, Windows
from fedcore.learner import EVAL_BATCH, first_batches

if TYPE_CHECKING:
    from fedcore.engines.stacked_gradients import StackedBatch, StackedGradient

__all__ = ["BatchedEngine", "batched_or_serial"]

log = logging.getLogger(__name__)

STACK_BYTES = 16 * 2**20
"""of the parameters that are computed together on a CPU: large models gain nothing from company, and lose the cache"""


def batched_or_serial(federation: Federation) -> Engine:
    """The batched engine, or the serial one with a line in the log on why it has to be."""
    try:
        gradient = checked_gradient(federation)
    except CannotStackError as reason:
        log.warning("engine batched: %s; clients run one after the other", reason)
        return SerialEngine(federation)
    log.info("engine batched: %s", gradient.how)
    return BatchedEngine(federation, gradient)


class BatchedEngine(Engine):
    """Clients stacked into one (clients, P) buffer; equal to ``serial`` up to rounding.

    Those with the most steps come first in the stack, which gets shorter as others end. Batches of unequal sizes are
    filled up with samples of weight zero. Where a client's data or the model raises, the clients of the stack are
    repeated one by one, so that only the one at fault is dropped.

    Args:
        federation: models of one rank, data, algorithm.
        gradient: of the model.
    """

    name: ClassVar[str] = "batched"
    exact: ClassVar[bool] = False

    def __init__(self, federation: Federation, gradient: StackedGradient) -> None:
        super().__init__(federation)
        self._gradient = gradient
        (self._learner,) = federation.learners.values()
        size = self._learner.spec.numel * self._learner.start.element_size()
        self._together = max(1, STACK_BYTES // size) if self._learner.device.type == "cpu" else 2**30

    def run(self, work: RoundWork) -> Iterator[ClientResult]:
        """Results in the order of ``work.clients``, after all have been computed."""
        found = {client.id: ClientResult(client, error="no data") for client in work.clients if not client.steps}
        queue = sorted((c for c in work.clients if c.steps), key=lambda c: (-c.steps, -c.samples, c.id))
        with threads(self.federation.threads):
            while queue:
                group = queue[: self._together]
                try:
                    results = _Stack(self.federation, work, group, self._gradient).train()
                except torch.OutOfMemoryError:
                    if len(group) > 1:
                        self._together = len(group) // 2
                        log.warning("engine batched: out of memory, %d clients at once from now on", self._together)
                        continue
                    results = self._singly(work, group)
                except Exception as error:  # of a client's data or the model: training them singly shows whose
                    log.warning("engine batched: %s; these clients run one by one", " ".join(str(error).split())[:300])
                    results = self._singly(work, group)
                found |= {result.client.id: result for result in results}
                queue = queue[len(group) :]
        for client in work.clients:
            yield found.pop(client.id)

    def _singly(self, work: RoundWork, group: Sequence[Client]) -> list[ClientResult]:
        return [train_client(self.federation, work, client, work.states(client.id)) for client in group]


class _Stack:
    """Local training of some clients together.

    Args:
        federation: models, data, algorithm.
        work: the round.
        clients: by falling number of steps, then of samples.
        gradient: of the model.
    """

    def __init__(
        self, federation: Federation, work: RoundWork, clients: Sequence[Client], gradient: StackedGradient
    ) -> None:
        self.federation, self.work, self.clients, self.gradient = federation, work, clients, gradient
        ((rank, self.learner),) = federation.learners.items()
        self.algorithm = federation.algorithms[rank]
        dtype = torch.promote_types(self.learner.spec.dtype, torch.float32)
        data = [federation.data[client.id] for client in clients]
        self.data = StackedData(data, self.learner.device, dtype, gradient.scratch)
        self.seeds = [federation.plan.rng(work.ctx.round, client.id) for client in clients]
        self.augments = any(federation.data[client.id].augments for client in clients)
        self.losses = torch.zeros(len(clients), dtype=torch.float64, device=self.learner.device)
        self.all = Client(
            tuple(client.id for client in clients),
            self._column([client.samples for client in clients]),
            self._column([client.steps for client in clients]),
            rank,
        )

    def _column(self, counts: list[int]) -> int | Tensor:
        """One number, or (clients, 1) where they differ."""
        if min(counts) == max(counts):
            return counts[0]
        # In the format of the parameters: whole numbers times a rate would be single precision, and a wider format
        # would spread to everything that is divided by it.
        dtype = torch.promote_types(self.learner.spec.dtype, torch.float32)
        return torch.tensor(counts, dtype=dtype, device=self.learner.device).unsqueeze(1)

    def train(self) -> list[ClientResult]:
        """All local steps of all clients; their results."""
        work, algorithm = self.work, self.algorithm
        ctx = replace(work.ctx, steps=self.all.steps)
        state = self._states()
        received, message = work.algorithm.broadcast(work.server, work.params, ctx, self.all)
        if work.buffers:
            self.learner.load_buffers(work.buffers)
        start, local = algorithm.local_init(received, message, state, ctx, self._full_gradient)
        params = self.gradient.scratch.empty((len(self.clients), start.shape[-1]), start.dtype, start.device)
        params, local = self._steps(params.copy_(start), local)
        upload, state = algorithm.local_finish(start, params, message, state, local, ctx)
        extra = tree_bytes(work.buffers)
        sent = tree_bytes(upload) // len(self.clients) + extra
        got = tree_bytes({**message, "": received}) + extra
        return self._results(algorithm.decode(upload), state, sent, got)

    def _states(self) -> Tree:
        """States of the clients, (clients, ...) each."""
        found = []
        for client in self.clients:
            state = self.work.states(client.id)
            if state is None:
                ctx = replace(self.work.ctx, steps=client.steps)
                state = initial_state(self.algorithm, ctx, client, self.learner.device)
            found.append(state)
        return {name: torch.stack([state[name] for state in found]) for name in found[0]}

    # ------------------------------------------------------------------ steps

    def _steps(self, params: Tensor, local: Local) -> tuple[Tensor, Local]:
        """The local steps; clients leave the stack, from its end, when theirs are over."""
        ctx = self.work.ctx
        rows = [self.data.rows(i, self._order(client)) for i, client in enumerate(self.clients)]
        windows, grad_fn = Windows(self.data, rows), _GradFn(self)
        active = len(self.clients)
        params_of_all, own_of_all = _Whole(params), _wholes(local.own, active)
        for k in range(self.clients[0].steps):
            remaining = sum(client.steps > k for client in self.clients)
            if remaining < active:
                params = params_of_all.first(remaining, params)
                for name, value in local.own.items():
                    local.own[name] = own_of_all[name].first(remaining, value)
                active = remaining
            draws = [generator(self.seeds[i], "augment", k) for i in range(active)] if self.augments else None
            batch = windows.batch(k, active, draws)
            steps = self.all.steps[:active] if isinstance(self.all.steps, Tensor) else self.all.steps
            rng = tuple((seed + k) % 2**63 for seed in self.seeds[:active])
            step = Step(k, steps, ctx.round, ctx.lr, ctx.last_lr, rng)
            params, local = self.algorithm.local_step(params, grad_fn, batch, local, step)
            if not k:
                own_of_all = _wholes(local.own, active)
        own = {name: own_of_all[name].all(value) for name, value in local.own.items()}
        return params_of_all.all(params), Local(local.shared, own)

    def grad(self, params: Tensor, batch: StackedBatch, rng: Sequence[int], count: bool) -> tuple[Tensor, Tensor]:
        """Gradients and losses of the first clients of the stack."""
        grads, losses = self.gradient(params.expand(len(batch.sizes), -1), batch, rng)
        if count:
            self.losses.narrow(0, 0, len(batch.sizes)).add_(losses)
        return grads, losses

    def _order(self, client: Client) -> list[Tensor]:
        return self.federation.plan.batches(self.work.ctx.round, client.id, client.samples)

    def _full_gradient(self, params: Tensor, batches: int = 0) -> Tensor:
        """Mean gradients (clients, P) of each client, in eval mode: over all data, or over its first ``batches``."""
        module = self.learner.task.module
        chosen: list[Sequence[Tensor]] = [
            first_batches(self._order(client), batches, client.samples)
            if batches
            else torch.arange(client.samples).split(EVAL_BATCH)
            for client in self.clients
        ]
        sizes = [sum(index.numel() for index in indices) for indices in chosen]
        params = params.expand(len(sizes), -1)
        total = torch.zeros_like(params)
        rows = [self.data.rows(i, indices) for i, indices in enumerate(chosen)]
        module.eval()
        try:
            for chunk in range(len(rows[0])):
                active = sum(len(row) > chunk for row in rows)
                batch = self.data.gather([row[chunk] for row in rows[:active]], sizes[:active])
                total[:active] += self.gradient(params[:active], batch, ())[0]
        finally:
            module.train()
        return total

    # ------------------------------------------------------------------ results

    def _results(self, upload: Tree, state: Tree, sent: int, got: int) -> list[ClientResult]:
        problems = _problems(upload, len(self.clients))
        losses = self.losses.tolist()
        results = []
        for i, client in enumerate(self.clients):
            error = self.data.errors.get(i, "")
            if error:
                results.append(ClientResult(client, error=error))
                continue
            mine, kept = ({name: value[i] for name, value in tree.items()} for tree in (upload, state))
            loss, buffers = losses[i] / client.steps, self.work.buffers
            results.append(ClientResult(client, mine, kept, buffers, loss, sent, got, error=problems.get(i, "")))
        return results


class _Whole:
    """A tensor (clients, ...) of which only the first rows are still worked on, in place or by replacing them.

    Args:
        rows: of all clients.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def first(self, count: int, current: Tensor) -> Tensor:
        """Keep ``current``, the rows worked on so far, and return the first ``count`` of them."""
        return self.all(current)[:count]

    def all(self, current: Tensor) -> Tensor:
        """All rows, with ``current`` as the first of them."""
        if len(current) == len(self._rows):
            self._rows = current
        elif current.data_ptr() != self._rows.data_ptr():
            self._rows[: len(current)] = current
        return self._rows


def _wholes(own: Tree, clients: int) -> dict[str, _Whole]:
    for name, value in own.items():
        if not value.ndim or len(value) != clients:
            raise ValueError(
                f"own[{name!r}] has the shape {tuple(value.shape)}, without a dimension of {clients} clients"
            )
    return {name: _Whole(value) for name, value in own.items()}


class _GradFn:
    """``fedcore.algorithm.GradFn`` of a stack."""

    def __init__(self, stack: _Stack) -> None:
        self._stack = stack
        self.missing: tuple[tuple[int, int], ...] = stack.gradient.missing

    def __call__(self, params: Tensor, batch: Any, *, rng: Any, update_buffers: bool = True) -> tuple[Tensor, Tensor]:
        return self._stack.grad(params, batch, rng, update_buffers)


def _problems(upload: Tree, clients: int) -> dict[int, str]:
    """Why the upload of a client cannot be used, by its place in the stack."""
    found: dict[int, str] = {}
    for name, value in upload.items():
        if not value.is_floating_point():
            continue
        rows = value.reshape(clients, -1)
        if bool(rows.sum(dim=1).isfinite().all()):
            continue
        for place in (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist():
            found.setdefault(place, f"{name} is not finite")
    return found
