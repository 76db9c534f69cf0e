"""``Simulation``: a federation of clients on one machine, driven round by round."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from polymodal.errors import UserError
from torch import Tensor, nn

from fedcore.algorithm import Algorithm, Client, Context, Tree
from fedcore.batches import ClientData
from fedcore.engines.base import Engine, Federation, RoundWork
from fedcore.history import History
from fedcore.learner import Learner
from fedcore.reduce import Reducer
from fedcore.sampling import LocalPlan, cohort_size, sample_cohort
from fedcore.store import ClientStore
from fedcore.tasks import StepTask, as_task

__all__ = ["RoundError", "Simulation"]

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1
POOL_FROM_SECONDS = 0.03
"""a serial round shorter than this gains nothing from worker processes"""


class RoundError(RuntimeError):
    """A round in which no client reported, or whose result is not finite. The state of the round before stands."""


class Simulation:
    """Federated training of one model over many clients.

    Args:
        model: a torch module, a ``polymodal.TaskModule`` or a LightningModule (serial only); with ``ranks``, a function
            ``rank -> module``. Its parameters are where training starts.
        clients: one dataset a client, see ``ClientData``.
        algorithm: from ``fedcore.algorithms.create``.
        loss: mean loss of ``(outputs, targets)`` for plain models.
        batch_size: samples of a local step.
        local_epochs: passes of a client over its data in a round (E).
        max_steps: cap of local steps (0: none).
        fraction: share of clients sampled each round, uniformly without replacement.
        cohorts: the clients of each round instead, e.g. ``[[0, 3], [1, 2]]``.
        shuffle: new order each epoch; False takes batches in stored order.
        seed: root of all draws: cohorts, orders, dropout.
        rounds: rounds of the whole run (T), for schedules over rounds; ``run`` sets it where it is None.
        engine: ``auto`` (serial or pool, whichever is quicker: same bits), ``serial``, ``pool``, ``batched``.
        workers: processes of the pool (default: cores).
        weighting: ``uniform`` means, as in the papers, or by ``samples``.
        ranks: adapter rank of each client, for models of unequal ranks.
        state_memory_mib: memory for client states; the rest is mapped from files (None: no limit).

    Raises:
        UserError: options out of range, an unknown engine, or a model that does not take the clients' data.
    """

    private: ClassVar[bool] = False
    """whether uploads go through a privacy mechanism"""

    def __init__(
        self,
        model: Any,
        clients: Sequence[Any],
        algorithm: Algorithm,
        *,
        loss: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
        batch_size: int = 50,
        local_epochs: int = 1,
        max_steps: int = 0,
        fraction: float = 0.1,
        cohorts: Sequence[Sequence[int]] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rounds: int | None = None,
        engine: str = "auto",
        workers: int | None = None,
        weighting: Literal["uniform", "samples"] = "uniform",
        ranks: Sequence[int] | None = None,
        state_memory_mib: float | None = None,
        exact_steps: bool = False,
    ) -> None:
        from fedcore.engines import check_engine

        if not clients:
            raise UserError("no clients; give one dataset a client")
        if weighting not in ("uniform", "samples"):
            raise UserError(f"weighting={weighting!r}; expected uniform or samples")
        check_engine(engine)
        if algorithm.private and not self.private:
            raise UserError(
                f"{type(algorithm).__name__} needs a privacy mechanism; use federate(..., privacy=PrivacyConfig(...))"
            )
        plan = LocalPlan(batch_size, local_epochs, max_steps, shuffle, seed, exact_steps)
        data = [ClientData(dataset) for dataset in clients]
        self.ranks = _checked_ranks(ranks, len(data))
        learners = _learners(model, loss, self.ranks)
        self._rank = max(learners)
        self.learner = learners[self._rank]
        starts = {r: learner.start for r, learner in learners.items()}
        specs = {r: learner.spec for r, learner in learners.items()}
        spec = replace(specs[self._rank], ranks=specs, starts=starts, clients=dict(Counter(self.ranks)))
        self.algorithm = algorithm.bind(spec)
        bound = {r: algorithm.bind(replace(specs[r], starts={r: starts[r]})) for r in learners}
        self.federation = Federation(bound, learners, data, plan)
        if algorithm.shifts_base:
            for learner in learners.values():
                learner.keep_base()
        self.cohorts = _checked_cohorts(cohorts, len(data))
        self.fraction = fraction
        self.cohort_size = max(map(len, self.cohorts)) if self.cohorts else cohort_size(len(data), fraction)
        self.seed, self.rounds = seed, rounds
        self.weighting: Literal["uniform", "samples"] = weighting
        self.engine, self.workers = engine, workers
        self._engine: Engine | None = None
        self.flat = self.learner.start.clone()
        self.buffers = self.learner.buffers
        self.server_state: Tree = self.algorithm.server_init(self.flat)
        self.store = ClientStore(state_memory_mib)
        self.done = 0
        self._last_lr: float | None = None
        self._timed = 0
        self._check_data()

    # ------------------------------------------------------------------ what users read

    @property
    def params(self) -> dict[str, Tensor]:
        """Global parameters by name (views of ``flat``)."""
        return self.learner.spec.unflatten(self.flat)

    @property
    def client_states(self) -> Mapping[int, Tree]:
        """State of every client that took part so far; empty for algorithms without client state."""
        return self.store

    @property
    def num_clients(self) -> int:
        """Clients of the federation (N)."""
        return len(self.federation.data)

    @property
    def evaluation_flat(self) -> Tensor:
        """Parameters (P,) that are evaluated: the global ones, or what the algorithm makes of them."""
        return self.algorithm.evaluation_params(self.server_state, self.flat)

    @property
    def model(self) -> nn.Module:
        """The module with its own copy of the parameters that are evaluated."""
        self._set_evaluated()
        self.learner.export(self.evaluation_flat)
        return self.learner.task.module

    def _set_evaluated(self) -> None:
        """Buffers and frozen weights of the largest model as they are evaluated."""
        if self.buffers:
            self.learner.load_buffers(self.buffers)
        if self.algorithm.shifts_base:
            self.learner.shift(self.algorithm.evaluation_shift(self.server_state, self.flat))

    # ------------------------------------------------------------------ training

    def run(
        self,
        rounds: int,
        test: Any = None,
        val: Any = None,
        eval_every: int = 1,
        on_round: Callable[[dict[str, Any]], None] | None = None,
    ) -> History:
        """Run ``rounds`` further rounds.

        Args:
            rounds: how many.
            test: dataset evaluated as ``test/…`` every ``eval_every`` rounds and after the last.
            val: dataset evaluated as ``val/…``.
            eval_every: rounds between evaluations.
            on_round: called with each row.
        """
        if rounds < 1 or eval_every < 1:
            raise UserError(f"rounds={rounds}, eval_every={eval_every}; expected at least 1")
        self.rounds = self.rounds or self.done + rounds
        history = History()
        for i in range(rounds):
            row = self.round()
            if (i + 1) % eval_every == 0 or i + 1 == rounds:
                for split, dataset in (("val", val), ("test", test)):
                    if dataset is not None:
                        row |= {f"{split}/{name}": value for name, value in self.evaluate(dataset).items()}
            history.rows.append(row)
            if on_round is not None:
                on_round(row)
        return history

    def round(self) -> dict[str, Any]:
        """Run one round; returns its row.

        Raises:
            RoundError: no client reported, or the new parameters are not finite; nothing has changed then.
            UserError: a learning rate of zero, or no cohort given for this round.
        """
        began = time.perf_counter()
        work = self._work()
        reducer = self.make_reducer()
        states: list[tuple[int, Tree]] = []
        for result in self._chosen_engine().run(work):
            if result.error:
                if reducer.tells:
                    log.warning("round %d: client %s dropped: %s", self.done, result.client.id, result.error)
            else:
                reducer.add(result)
                states.append((result.client.id, result.state))
            reducer.count(result)
        if not reducer.reported and reducer.needs_reports:
            raise RoundError(f"round {self.done}: all {len(work.clients)} clients failed; first: {reducer.first_error}")
        ctx = reducer.context(work.ctx)
        flat, server = self.algorithm.server_step(self.server_state, self.flat, reducer.result(), ctx)
        if not bool(torch.isfinite(flat.sum())):
            raise RoundError(f"round {self.done}: the new parameters are not finite; lower the learning rate")
        self.flat, self.server_state = flat, server
        self.buffers = reducer.buffers() or self.buffers
        for client, state in states:
            self.store.put(client, state)
        self.done, self._last_lr = self.done + 1, ctx.lr
        seconds = time.perf_counter() - began
        self._consider_pool(seconds)
        return {"round": self.done, "lr": ctx.lr, **reducer.row(), "seconds": seconds}

    def make_reducer(self) -> Reducer:
        """What sees the uploads of one round: the only place where a privacy mechanism comes in."""
        return Reducer(self.algorithm.reduction, self.weighting)

    def _work(self) -> RoundWork:
        """The clients and public numbers of the round to come."""
        ids = self.cohort()
        lr = self.algorithm.rate(self.done, max(self.rounds or 0, self.done + 1))
        plan, data = self.federation.plan, self.federation.data
        clients = [Client(i, len(data[i]), plan.steps(len(data[i])), self.ranks[i]) for i in ids]
        last = lr if self._last_lr is None else self._last_lr
        most = max((client.steps for client in clients), default=plan.max_steps)
        ctx = Context(self.done, self.rounds or self.done + 1, self.num_clients, len(ids), lr, last, most, most)
        return RoundWork(self.algorithm, self.server_state, self.flat, self.buffers, ctx, clients, self.store.get)

    def cohort(self) -> list[int]:
        """Clients of the round to come, ascending.

        Raises:
            UserError: cohorts were given for fewer rounds.
        """
        if self.cohorts is None:
            return sample_cohort(self.seed, self.done, self.num_clients, self.cohort_size)
        if self.done >= len(self.cohorts):
            raise UserError(f"cohorts are given for {len(self.cohorts)} rounds; this is round {self.done + 1}")
        return self.cohorts[self.done]

    # ------------------------------------------------------------------ engines

    def _chosen_engine(self) -> Engine:
        if self._engine is None:
            from fedcore.engines import make_engine

            self._engine = make_engine(self)
            if self.engine != "auto" or self._engine.name != "serial":
                self.engine = self._engine.name
        return self._engine

    def _consider_pool(self, seconds: float) -> None:
        """After the second serial round of ``auto`` (the first warms up): worker processes, where they pay."""
        self._timed += 1
        if self.engine != "auto" or self._timed < 2:
            return
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        workers = min(self.workers or cores, self.cohort_size)
        plain = isinstance(self.learner.task, StepTask) or self.learner.device.type != "cpu"
        pays = workers > 1 and seconds > POOL_FROM_SECONDS and not plain
        self.engine = "pool" if pays else "serial"
        if not self.private:  # a time tells the size of the cohort
            log.info("engine %s: a round took %.0f ms, %d cores", self.engine, 1000 * seconds, cores)
        if pays:
            self.close()

    def close(self) -> None:
        """End worker processes; the simulation can go on and starts them again."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *arguments: object) -> None:
        self.close()

    # ------------------------------------------------------------------ measuring, saving

    def evaluate(self, dataset: Any) -> dict[str, float]:
        """Metrics of the global model on a dataset: ``accuracy`` and ``loss``, or those of the TaskModule."""
        self._set_evaluated()
        data = dataset if isinstance(dataset, ClientData) else ClientData(dataset)
        return self.learner.evaluate(self.evaluation_flat, data)

    def state_dict(self, clients: bool = True) -> dict[str, Any]:
        """Everything that a resumed run needs: tensors and plain values.

        Args:
            clients: with the states of clients (False where these are saved elsewhere).
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "round": self.done,
            "rounds": self.rounds,
            "seed": self.seed,
            "last_lr": self._last_lr,
            "engine": self.engine,
            "algorithm": type(self.algorithm).__name__,
            "flat": self.flat.clone(),
            "buffers": {name: value.clone() for name, value in self.buffers.items()},
            "server": {name: value.clone() for name, value in self.server_state.items()},
            "clients": {i: {name: v.clone() for name, v in self.store[i].items()} for i in self.store if clients},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            UserError: a newer schema, another algorithm, or another model.
        """
        if state["schema_version"] > SCHEMA_VERSION:
            raise UserError(f"state of schema version {state['schema_version']}; this fedcore reads {SCHEMA_VERSION}")
        if "privacy" in state and not self.private:
            raise UserError("state of a private run, whose privacy ledger would be lost here; resume with privacy=...")
        if state["algorithm"] != type(self.algorithm).__name__:
            raise UserError(f"state of {state['algorithm']}, not of {type(self.algorithm).__name__}")
        if state["flat"].shape != self.flat.shape:
            raise UserError(f"state of a model with {state['flat'].numel()} parameters, not {self.flat.numel()}")
        device = self.flat.device
        self.flat = state["flat"].to(device, copy=True)
        self.buffers = {name: value.to(device, copy=True) for name, value in state["buffers"].items()}
        self.server_state = {name: value.to(device, copy=True) for name, value in state["server"].items()}
        self.done, self._last_lr, self.seed = state["round"], state["last_lr"], state["seed"]
        self.rounds = self.rounds or state["rounds"]
        if self.engine == "auto":
            self.engine = state["engine"]
        self.store.clear()
        for client, kept in state["clients"].items():
            self.store.put(int(client), {name: value.to(device) for name, value in kept.items()})
        self.close()

    def _check_data(self) -> None:
        """One gradient on the first client's data that can be read, so that wrong shapes end here.

        Clients whose data cannot be read are no error yet: they are dropped in the rounds that choose them.
        """
        batch, failure = None, "no client has any data"
        for data in self.federation.data:
            if batch is None and len(data):
                try:
                    batch = data.batch(torch.arange(min(2, len(data))), None)
                except Exception as error:
                    failure = f"no client's data can be read: {' '.join(str(error).split())[:200]}"
        if batch is None:
            raise UserError(failure)
        try:
            self.learner.check(batch)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            text = " ".join(str(error).split())[:200]
            raise UserError(f"the model or loss does not take the clients' data: {text}") from error


def _learners(model: Any, loss: Callable[[Tensor, Any], Tensor], ranks: Sequence[int]) -> dict[int, Learner]:
    """One learner a rank; rank 0 alone where ranks are not used."""
    kinds = sorted(set(ranks))
    if kinds == [0]:
        return {0: Learner(as_task(model, loss))}
    if isinstance(model, nn.Module) or not callable(model):
        raise UserError("with ranks, model must be a function: rank -> module")
    return {rank: Learner(as_task(model(rank), loss)) for rank in kinds}


def _checked_ranks(ranks: Sequence[int] | None, clients: int) -> list[int]:
    if ranks is None:
        return [0] * clients
    if len(ranks) != clients or min(ranks) < 1:
        raise UserError(f"ranks: {len(ranks)} for {clients} clients; expected one of at least 1 for each")
    return list(ranks)


def _checked_cohorts(cohorts: Sequence[Sequence[int]] | None, clients: int) -> list[list[int]] | None:
    if cohorts is None:
        return None
    for round, members in enumerate(cohorts):
        if not members:
            raise UserError(f"cohorts: that of round {round} is empty")
        if len(set(members)) < len(members) or min(members) < 0 or max(members) >= clients:
            raise UserError(f"cohorts: {list(members)} in round {round}; expected distinct ids of 0..{clients - 1}")
    return [sorted(members) for members in cohorts]
