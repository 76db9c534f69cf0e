"""``PrivateSimulation``: a federation whose every round is one accounted release."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from polymodal.errors import UserError
from torch import nn

from fedcore.algorithm import Algorithm, Client, Context, Tree
from fedcore.engines.base import RoundWork, initial_state
from fedcore.privacy import accounting
from fedcore.privacy.ledger import Event, Ledger
from fedcore.privacy.mechanism import ClientDPMechanism, MechanismSettings, spans_of
from fedcore.privacy.noise import NoiseSource
from fedcore.privacy.report import PrivacyReport
from fedcore.privacy_settings import PrivacyConfig
from fedcore.simulation import Simulation

__all__ = ["BudgetError", "PrivateSimulation"]

log = logging.getLogger(__name__)
AHEAD = 64
"""rounds that the budget is looked ahead where the length of the run is not known"""
WEAK = 10.0
"""epsilon from which a report calls the guarantee weak"""


class BudgetError(UserError):
    """The next round would exceed the privacy budget; it was not begun, and the last checkpoint stands."""


class PrivateSimulation(Simulation):
    """Federated training with client-level differential privacy (central, trusted server).

    Every round is one release of the sum of clipped uploads plus noise, divided by the fixed m = q N; all else is made
    of released vectors. The event of a round is in the ledger, and on the disk, before the vector leaves the mechanism.
    Clients, server step and broadcasts see public numbers alone: m instead of the size of the cohort, the same K
    everywhere. Rows of rounds hold the round and its learning rate; losses, cohorts, bytes and times come with
    ``unsafe_debug_metrics`` only, and epsilon is infinite then.

    Takes every algorithm whose uploads are added up, private ones (``algorithm.private``) and others: what they do with
    the noisy sum is post-processing.

    Args:
        model: as for ``Simulation``; without BatchNorm or other statistics that move in training.
        clients: one dataset a client.
        algorithm: the method.
        privacy: clip, noise, sampling.
        options: of ``Simulation``. ``fraction`` is q; ``cohorts`` are for tests, and with Poisson sampling epsilon is
            infinite then.

    Raises:
        UserError: a model, a method or options that no guarantee can be given for.
    """

    private: ClassVar[bool] = True

    def __init__(
        self, model: Any, clients: Sequence[Any], algorithm: Algorithm, *, privacy: PrivacyConfig, **options: Any
    ) -> None:
        accounting.require()
        _check_options(privacy, algorithm, options)
        with_clip = getattr(algorithm, "with_clip", None)  # methods whose clients know C
        if with_clip is not None and privacy.clip is not None:
            algorithm = with_clip(privacy.clip)
        super().__init__(model, clients, algorithm, **options)
        self.privacy = privacy
        self.delta = privacy.delta if privacy.delta is not None else 1.0 / (10 * self.num_clients)
        self.ledger = Ledger()
        given = self.cohorts is not None or privacy.sampling == "fixed"
        self.sampling_rate = self.cohort_size / self.num_clients if given else self.fraction
        self.denominator = float(self.cohort_size) if given else self.fraction * self.num_clients
        self.public_steps = self._same_steps()
        self.reasons = self._why_not()
        if privacy.target_epsilon is not None and self.reasons:
            raise UserError(f"privacy.target_epsilon cannot be kept: {self.reasons[0]}; give noise_multiplier instead")
        test_seed = self.seed if privacy.deterministic_noise_for_tests else None
        self.noise = NoiseSource(secure=privacy.secure_noise, test_seed=test_seed)
        self._sigma = privacy.noise_multiplier
        self._drawn: tuple[int, list[int]] | None = None
        self._now: RoundWork | None = None
        self._left: int | None = None
        self._refuse_statistics()
        for text in [f"epsilon is infinite: {reason}" for reason in self.reasons] + self._doubts():
            log.warning("privacy: %s", text)

    # ------------------------------------------------------------------ what must be true

    def _same_steps(self) -> int:
        """K, which must tell nothing about a client's data."""
        plan = self.federation.plan
        found = sorted({plan.steps(len(data)) for data in self.federation.data if len(data)})
        if len(found) != 1:
            raise UserError(
                f"clients take {found[0]} to {found[-1]} local steps, which tells their sizes; set the same number "
                f"for all: max_steps={found[-1]} with exact_steps=true"
            )
        return found[0]

    def _why_not(self) -> tuple[str, ...]:
        """Why there is no guarantee, though the run may go on."""
        privacy, sigma = self.privacy, self.privacy.noise_multiplier
        conditions = {
            "clip_mode=official_median: the bound is made of private data": privacy.clip_mode == "official_median",
            "noise_multiplier=0: no noise": sigma == 0,
            "clip is infinite": privacy.clip is not None and math.isinf(privacy.clip),
            "unsafe_debug_metrics: losses, cohorts and norms are written": privacy.unsafe_debug_metrics,
            "deterministic_noise_for_tests: noise from the run's seed": privacy.deterministic_noise_for_tests,
            "cohorts are given, not drawn": self.cohorts is not None and privacy.sampling == "poisson",
        }
        return tuple(text for text, true in conditions.items() if true)

    def _doubts(self) -> list[str]:
        """What the method itself has to say against C."""
        speak, clip = getattr(self.algorithm, "clip_warning", None), self.privacy.clip
        found = "" if speak is None or clip is None else speak(clip, self.public_steps, self.algorithm.lr)
        return [found] if found else []

    def _refuse_statistics(self) -> None:
        """UserError where the model has statistics that move in training: they would be released without noise."""
        module = self.learner.task.module
        for name, layer in module.named_modules():
            batch = isinstance(layer, nn.modules.batchnorm._BatchNorm)
            if batch or (isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats):
                raise UserError(
                    f"{name or 'the model'} is {type(layer).__name__}, whose running statistics have no noise; take "
                    "GroupNorm or LayerNorm"
                )
        before = {name: value for name, value in self.learner.buffers.items() if value.is_floating_point()}
        if not before:
            return
        data = next(data for data in self.federation.data if len(data))
        batch = data.batch(torch.arange(min(2, len(data))), None)
        self.learner(self.flat.clone(), batch, rng=0)
        after, kept = self.learner.buffers, dict(self.buffers)
        self.learner.load_buffers(kept)
        moved = next((name for name, value in before.items() if not torch.equal(value, after[name])), None)
        if moved is not None:
            raise UserError(f"buffer {moved} changes in training, and would be released without noise; take it out")

    # ------------------------------------------------------------------ a round

    @property
    def noise_multiplier(self) -> float:
        """Sigma; where only a target is given, the least that keeps it over all rounds of the run.

        Raises:
            UserError: a target, but the number of rounds is not known.
        """
        if self._sigma is None:
            target = self.privacy.target_epsilon
            if self.rounds is None or target is None:
                raise UserError("privacy.target_epsilon needs the number of rounds; give rounds, or noise_multiplier")
            kind = self.privacy.sampling
            self._sigma = accounting.calibrate(target, self.sampling_rate, self.rounds, self.delta, sampling=kind)
            log.info("privacy: sigma %g for epsilon %g after %d rounds", self._sigma, target, self.rounds)
        return self._sigma

    def round(self) -> dict[str, Any]:
        """Run one round.

        Raises:
            BudgetError: it would exceed the budget; nothing has happened then.
            RoundError: as in ``Simulation``.
            UserError: the ledger cannot be written; nothing has been released then.
        """
        self._check_budget()
        self._chosen_engine()
        try:
            with self._discreet():
                row = super().round()
        finally:
            self._drawn = self._now = None  # a round that is tried again draws other clients
        if not self.privacy.unsafe_debug_metrics:
            del row["seconds"]  # tells the size of the cohort
        return row

    @contextlib.contextmanager
    def _discreet(self) -> Iterator[None]:
        """Without the engines' lines on clients that fail, whose errors may even quote data."""
        logger = logging.getLogger("fedcore.engines")
        before = logger.level
        if not self.privacy.unsafe_debug_metrics:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(before)

    def cohort(self) -> list[int]:
        """Clients of the round to come, the same until it has been run. A secret of the server: never to be written."""
        if self.cohorts is not None:
            return super().cohort()
        if self._drawn is None or self._drawn[0] != self.done:
            if self.privacy.sampling == "poisson":
                ids = self.noise.poisson(self.num_clients, self.sampling_rate, self.done)
            else:
                ids = self.noise.fixed(self.num_clients, self.cohort_size, self.done)
            self._drawn = (self.done, ids)
        return list(self._drawn[1])

    def _work(self) -> RoundWork:
        work = super()._work()
        m: Any = self.denominator  # may be a fraction
        work.ctx = replace(work.ctx, cohort=m, steps=self.public_steps, max_steps=self.public_steps)
        self._now = work
        return work

    def make_reducer(self) -> ClientDPMechanism:
        """The mechanism of the round at hand."""
        work = self._now or self._work()
        privacy = self.privacy
        settings = MechanismSettings(
            clip=math.inf if privacy.clip is None else privacy.clip,
            noise_multiplier=self.noise_multiplier,
            denominator=self.denominator,
            steps=self.public_steps,
            clip_mode=privacy.clip_mode,
            noise_location=privacy.noise_location,
            tell=privacy.unsafe_debug_metrics,
        )
        layout = self._layout(work.ctx)
        parameters = [(item.start, item.stop) for item in self.learner.spec]
        return ClientDPMechanism(
            settings,
            layout,
            self.noise,
            self._announce,
            round=self.done,
            cohort=[client.id for client in work.clients],
            spans=spans_of(layout, parameters, privacy.clip_mode),
        )

    def _layout(self, ctx: Context) -> Tree:
        """An upload of zeros, from public values alone: names and shapes must not depend on what clients send."""
        empty = getattr(self.algorithm, "empty_upload", None)
        found: Tree = self._moveless(ctx) if empty is None else empty(self.flat, ctx)
        wrong = next((name for name, value in found.items() if not value.is_floating_point()), None)
        if wrong is not None or not found:
            raise UserError(f"{type(self.algorithm).__name__} uploads {wrong or 'nothing'}, which takes no noise")
        return found

    def _moveless(self, ctx: Context) -> Tree:
        """The upload of a client that ends where it starts: no data are read."""
        algorithm = self.federation.algorithms[self._rank]
        client = Client(0, 1, self.public_steps, self._rank)
        state = initial_state(algorithm, ctx, client, self.learner.device)
        received, message = self.algorithm.broadcast(self.server_state, self.flat, ctx, client)
        start, local = algorithm.local_init(received, message, state, ctx, torch.zeros_like)
        return algorithm.decode(algorithm.local_finish(start, start.clone(), message, state, local, ctx)[0])

    # ------------------------------------------------------------------ ledger and budget

    def open_ledger(self, path: str | Path) -> None:
        """Keep the ledger in a file, too, whose events and those known so far are joined.

        Raises:
            UserError: the file cannot be read or written, is damaged, or of another schema.
        """
        self.ledger.open(Path(path))
        self._left = None

    def _event(self, numbers: int) -> Event:
        return Event(
            round=self.done,
            sampling=self.privacy.sampling,
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
            clip=math.inf if self.privacy.clip is None else self.privacy.clip,
            clients=self.num_clients,
            numbers=numbers,
            reasons=self.reasons,
        )

    def _announce(self, numbers: int) -> None:
        self.ledger.append(self._event(numbers))
        if self._left is not None:
            self._left -= 1

    def _check_budget(self) -> None:
        """BudgetError where one more release exceeds the target."""
        target = self.privacy.target_epsilon
        if target is None:
            return
        if not self._left:
            most = max(1, self.rounds - self.done) if self.rounds else AHEAD
            following = self._event(self.learner.spec.numel)
            self._left = accounting.rounds_within(self.ledger.events, following, target, self.delta, most)
        if not self._left:
            raise BudgetError(
                f"privacy budget: epsilon is {self.epsilon:.4g} after {len(self.ledger)} releases, another exceeds "
                f"privacy.target_epsilon={target:g}; the last checkpoint stands, raise the target or stop here"
            )

    @property
    def epsilon(self) -> float:
        """Epsilon (PLD) of all that was released so far; infinite where the run as it is set up gives no guarantee."""
        return math.inf if self.reasons else accounting.epsilon_of(self.ledger.events, self.delta)

    def epsilon_now(self) -> float:
        """An upper bound of ``epsilon``, usually within a hundredth, and much quicker: for curves over rounds."""
        if self.reasons:
            return math.inf
        events = self.ledger.events
        found = accounting.epsilon_of(events, self.delta, interval=accounting.QUICK_INTERVAL)
        if found < 1:  # narrow cells matter where losses are small, and cost little
            found = accounting.epsilon_of(events, self.delta, interval=accounting.SEARCH_INTERVAL)
        return found

    def report(self) -> PrivacyReport:
        """The guarantee of what was released so far."""
        events, privacy = self.ledger.events, self.privacy
        reasons = tuple(dict.fromkeys(reason for event in events for reason in event.reasons)) or self.reasons
        epsilon = self.epsilon
        fixed = privacy.sampling == "fixed" or any(event.sampling == "fixed" for event in events)
        warnings = {
            f"delta {self.delta:.3g} is not below 1 / {self.num_clients} clients": self.delta * self.num_clients >= 1,
            f"epsilon above {WEAK:g} is a weak guarantee": WEAK < epsilon < math.inf,
            "noise added by clients is safe with secure aggregation only, which is not simulated": (
                privacy.noise_location == "client"
            ),
        }
        return PrivacyReport(
            epsilon=epsilon,
            epsilon_rdp=accounting.epsilon_of(events, self.delta, "rdp"),
            delta=self.delta,
            adjacency=accounting.ADJACENCY["fixed" if fixed else "poisson"],
            releases=len(events),
            noise_multiplier=math.nan if self._sigma is None else self._sigma,
            noise_multipliers=tuple(sorted({event.noise_multiplier for event in events})),
            clip=math.inf if privacy.clip is None else privacy.clip,
            clip_mode=privacy.clip_mode,
            noise_location=privacy.noise_location,
            sampling=privacy.sampling,
            sampling_rate=self.sampling_rate,
            clients=self.num_clients,
            expected_cohort=self.denominator,
            random=NoiseSource.described[self.noise.mode],
            library=accounting.library_version(),
            reasons=reasons,
            warnings=(*[text for text, true in warnings.items() if true], *self._doubts()),
            unsafe_metrics=privacy.unsafe_debug_metrics,
        )

    # ------------------------------------------------------------------ saving

    def state_dict(self, clients: bool = True) -> dict[str, Any]:
        """As of ``Simulation``, with the ledger and sigma, and nothing of the noise."""
        return {
            **super().state_dict(clients),
            "privacy": {"ledger": self.ledger.to_dict(), "noise_multiplier": self._sigma},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; its events and those known here are joined, none is forgotten.

        Raises:
            UserError: as of ``Simulation``, or a ledger that is damaged or of another schema.
        """
        saved = state.get("privacy")
        events = [] if saved is None else Ledger.events_of(saved["ledger"])
        super().load_state_dict(state)
        if saved is None and state["round"]:
            why = ("the run was begun without privacy",)
            events = [Event(0, self.privacy.sampling, self.sampling_rate, 0.0, 0.0, self.num_clients, 0, why)]
        self.ledger.merge(events)
        if saved is not None and self.privacy.noise_multiplier is None:
            self._sigma = saved["noise_multiplier"]
        self._drawn, self._left = None, None
        if self.privacy.deterministic_noise_for_tests:
            self.noise = NoiseSource(test_seed=self.seed)


def _check_options(privacy: PrivacyConfig, algorithm: Algorithm, options: Mapping[str, Any]) -> None:
    """UserError where method and options do not go with privacy."""
    name, clip, sigma = type(algorithm).__name__, privacy.clip, privacy.noise_multiplier
    for bad, text in (
        (algorithm.reduction == "list", f"{name} needs each upload by itself, and a mechanism gives their sum alone"),
        (
            options.get("weighting", "uniform") != "uniform",
            "weighting=samples: weights tell the sizes of clients' data; use weighting=uniform",
        ),
        (len(set(options.get("ranks") or [0])) > 1, "ranks: unequal ranks make unequal uploads; give one rank for all"),
        (
            clip is None and privacy.clip_mode != "official_median",
            "privacy.clip is needed: C, largest norm of an upload, a public constant; start near the norm of an update "
            "on public data",
        ),
        (
            sigma is None and privacy.target_epsilon is None,
            "privacy.noise_multiplier or privacy.target_epsilon is needed, e.g. noise_multiplier=0.8",
        ),
        (
            clip is not None and math.isinf(clip) and sigma != 0,
            "privacy.clip is infinite, which no noise covers; give a finite one",
        ),
        (
            privacy.noise_location == "client" and privacy.sampling != "fixed",
            "privacy.noise_location=client needs privacy.sampling=fixed (and secure aggregation)",
        ),
    ):
        if bad:
            raise UserError(text)
