"""Epsilon of what was executed, by dp-accounting; no torch.

The unit is one client with all its data over all rounds; the adversary sees every released vector.

- ``poisson``: each client takes part with probability q, adjacency add/remove one client: a sampled Gaussian with noise
  multiplier sigma.
- ``fixed``: cohorts of one size, adjacency replace one client, whose sensitivity is 2 C: sigma / 2, and no
  amplification, so that the bound holds however the cohorts are chosen, as long as the data play no part in it.
- ``without_replacement``: the same with amplification by uniform draws, RDP only, for comparison with other systems;
  dp-accounting expects the multiplier relative to the replace-one sensitivity, so again sigma / 2.

Source: specification 3.9; dp-accounting 0.6 (Google).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from polymodal.errors import UserError

if TYPE_CHECKING:
    from fedcore.privacy.ledger import Event

__all__ = [
    "ADJACENCY",
    "Release",
    "calibrate",
    "curve",
    "epsilon",
    "epsilon_of",
    "library_version",
    "require",
    "rounds_within",
]

Accountant = Literal["pld", "rdp"]
Sampling = Literal["poisson", "fixed", "without_replacement"]
ADJACENCY = {
    "poisson": "add or remove one client",
    "fixed": "replace one client",
    "without_replacement": "replace one client",
}
INTERVAL = 1e-4
"""width of the cells in which PLD counts privacy losses"""
SEARCH_INTERVAL = 1e-3
"""for searches, a tenth of the time; what they find is checked at ``INTERVAL``"""
QUICK_INTERVAL = 1e-2
"""for curves over rounds, a fiftieth of the time"""
CELLS = 5e5
"""that losses may fill: beyond, cells are made wider, which rounds epsilon up"""
HOPELESS = 1e6
"""losses beyond which RDP is all that is computed"""
STEP = 1e-4
"""to which a calibrated sigma is rounded up"""
MOST_NOISE = 1e7


class Release(NamedTuple):
    """One kind of released vector.

    Args:
        sampling: how clients were chosen.
        rate: q, probability or share of a client.
        noise: sigma, noise multiplier relative to the clip bound C.
    """

    sampling: str
    rate: float
    noise: float


def require() -> Any:
    """The dp-accounting package; UserError where it is not installed."""
    try:
        import dp_accounting
    except ImportError as error:
        raise UserError(f"epsilon needs dp-accounting ({error}); pip install 'dp-accounting>=0.5'") from error
    return dp_accounting


def library_version() -> str:
    """``dp-accounting 0.6.0``, or that it is not installed."""
    try:
        return f"dp-accounting {metadata.version('dp-accounting')}"
    except metadata.PackageNotFoundError:
        return "dp-accounting not installed"


# ------------------------------------------------------------------ epsilon


def epsilon(
    sampling_rate: float,
    noise_multiplier: float,
    rounds: int,
    delta: float,
    accountant: Accountant = "pld",
    sampling: Sampling = "poisson",
) -> float:
    """Epsilon of ``rounds`` releases.

    Args:
        sampling_rate: q in (0, 1].
        noise_multiplier: sigma, 0 or more: the noise on the clipped sum has deviation sigma C. 0 gives infinity.
        rounds: releases, 0 or more.
        delta: in (0, 1).
        accountant: ``pld`` (tight) or ``rdp``.
        sampling: how clients are chosen, see above.

    Raises:
        UserError: a value out of range, or dp-accounting is not installed.
    """
    _check(sampling_rate, delta, accountant)
    for name, value, good, expected in (
        ("noise_multiplier", noise_multiplier, noise_multiplier >= 0, "0 or more"),
        ("rounds", rounds, rounds >= 0 and rounds == int(rounds), "a whole number, 0 or more"),
        ("sampling", sampling, sampling in ADJACENCY, ", ".join(ADJACENCY)),
    ):
        if not good:
            raise UserError(f"{name}={value!r}; expected {expected}")
    counts = ((Release(sampling, float(sampling_rate), float(noise_multiplier)), int(rounds)),) if rounds else ()
    return _epsilon(counts, delta, accountant, INTERVAL)


def epsilon_of(
    events: Iterable[Event], delta: float, accountant: Accountant = "pld", interval: float = INTERVAL
) -> float:
    """Epsilon of the events of a ledger; infinity where one of them gives no guarantee.

    Events of changing sigma or q are composed as they were. Where both kinds of cohorts occur, the guarantee is that of
    replacing one client, without any amplification, which bounds both.

    Args:
        events: what was released.
        delta: in (0, 1).
        accountant: ``pld`` or ``rdp``.
        interval: width of PLD's cells; wider ones are quicker and round up.
    """
    _check(1.0, delta, accountant)
    found = list(events)
    if any(event.reasons for event in found):
        return math.inf
    releases = [Release(event.sampling, event.sampling_rate, event.noise_multiplier) for event in found]
    if len({release.sampling for release in releases}) > 1:
        releases = [release._replace(sampling="fixed") for release in releases]
    return _epsilon(tuple(sorted(Counter(releases).items())), delta, accountant, interval)


def _check(rate: float, delta: float, accountant: str) -> None:
    for name, value, good, expected in (
        ("sampling_rate", rate, 0 < rate <= 1, "0 < sampling_rate <= 1"),
        ("delta", delta, 0 < delta < 1, "0 < delta < 1, well below 1 / clients"),
        ("accountant", accountant, accountant in ("pld", "rdp"), "pld or rdp"),
    ):
        if not good:
            raise UserError(f"{name}={value!r}; expected {expected}")


@lru_cache(maxsize=4096)
def _epsilon(counts: tuple[tuple[Release, int], ...], delta: float, accountant: str, interval: float) -> float:
    """Epsilon of so many releases of each kind."""
    if not counts:
        return 0.0
    if any(not release.noise > 0 for release, _ in counts):
        return math.inf
    if accountant == "rdp":
        return _composed(counts, delta, "rdp", interval)
    if any(release.sampling == "without_replacement" for release, _ in counts):
        raise UserError("accountant=pld cannot take draws without replacement; use accountant=rdp")
    # What the Gaussians without amplification could cost. Where that is enormous, narrow cells would need gigabytes;
    # wider ones round up, and so does RDP, so that the bound stays one.
    mu = math.sqrt(sum(count / _relative(release) ** 2 for release, count in counts))
    most = mu * mu / 2 + 10 * mu
    return _composed(counts, delta, "pld" if most < HOPELESS else "rdp", max(interval, most / CELLS))


def _relative(release: Release) -> float:
    """Deviation of the noise over the sensitivity: replacing a client changes the sum by up to 2 C."""
    return release.noise if release.sampling == "poisson" else release.noise / 2


def _composed(counts: tuple[tuple[Release, int], ...], delta: float, accountant: str, interval: float) -> float:
    library = require()
    relation = library.NeighboringRelation.ADD_OR_REMOVE_ONE
    if any(release.sampling == "without_replacement" for release, _ in counts):
        relation = library.NeighboringRelation.REPLACE_ONE
    with _quiet():
        if accountant == "rdp":
            chosen = library.rdp.RdpAccountant(neighboring_relation=relation)
        else:
            chosen = library.pld.PLDAccountant(relation, value_discretization_interval=interval)
        for release, count in counts:
            chosen.compose(_event(library, release), count)
        return float(chosen.get_epsilon(delta))


def _event(library: Any, release: Release) -> Any:
    """The event of one release as dp-accounting knows it."""
    event = library.GaussianDpEvent(_relative(release))
    if release.sampling == "fixed" or release.rate == 1:
        return event
    if release.sampling == "poisson":
        return library.PoissonSampledDpEvent(release.rate, event)
    size = 10**6  # only the ratio counts
    return library.SampledWithoutReplacementDpEvent(size, round(size * release.rate), event)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's lines on Renyi orders that it leaves out, which leaves the bound one.

    Nor the handler that its calls of ``logging.warning`` give the root logger, after which every line comes twice.
    """
    logger = logging.getLogger("absl")
    level, handlers, own = logger.level, logging.root.handlers[:], logger.handlers[:]
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        logging.root.handlers[:], logger.handlers[:] = handlers, own


# ------------------------------------------------------------------ noise for a target, curves, budgets


def calibrate(
    target_epsilon: float,
    sampling_rate: float,
    rounds: int,
    delta: float,
    accountant: Accountant = "pld",
    sampling: Sampling = "poisson",
) -> float:
    """The least sigma, rounded up to 1e-4, whose epsilon after ``rounds`` is at most the target.

    Args:
        target_epsilon: more than 0.
        sampling_rate: q in (0, 1].
        rounds: releases, at least 1.
        delta: in (0, 1).
        accountant: ``pld`` or ``rdp``.
        sampling: how clients are chosen.

    Raises:
        UserError: a value out of range, or a target that no noise below 1e7 reaches.
    """
    _check(sampling_rate, delta, accountant)
    for name, value, good in (
        ("target_epsilon", target_epsilon, 0 < target_epsilon < math.inf),
        ("rounds", rounds, rounds >= 1),
    ):
        if not good:
            raise UserError(f"{name}={value}; expected a number more than 0")

    def at(sigma: float, interval: float = INTERVAL) -> float:
        return _epsilon(((Release(sampling, sampling_rate, sigma), rounds),), delta, accountant, interval)

    low, high = _bracket(lambda sigma: at(sigma, QUICK_INTERVAL) > target_epsilon)

    def gap(interval: float) -> Callable[[float], float]:  # nearly a straight line in logarithms: few evaluations
        return lambda x: math.log(max(at(math.exp(x), interval), 1e-12) / target_epsilon)

    found = _root(gap(SEARCH_INTERVAL), math.log(low), math.log(high))
    exact, width = gap(INTERVAL), 0.01
    while exact(found - width) <= 0 and found - width > math.log(STEP):  # wider cells round up: less noise may do
        found, width = found - width, 2 * width
    found = _root(exact, found - width, found)
    steps = max(1, math.ceil(math.exp(found) / STEP))
    while at(steps * STEP) > target_epsilon:
        steps += 1
    while steps > 1 and at((steps - 1) * STEP) <= target_epsilon:
        steps -= 1
    return round(steps * STEP, 10)


def _bracket(exceeds: Callable[[float], bool]) -> tuple[float, float]:
    """Two sigmas, the first of which exceeds the target and the second does not."""
    high = 1.0
    while exceeds(high):
        high *= 2
        if high > MOST_NOISE:
            raise UserError("no amount of noise reaches this epsilon; raise it or delta, or run fewer rounds")
    low = high / 2
    while low > STEP and not exceeds(low):
        low, high = low / 2, low
    return low, high


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a decreasing function crosses zero; an end of the interval where it does not."""
    from scipy.optimize import brentq

    if function(low) <= 0:
        return low
    if function(high) >= 0:
        return high
    return float(brentq(function, low, high, xtol=1e-5, rtol=1e-12))


def curve(
    sampling_rate: float,
    noise_multiplier: float,
    rounds: int,
    delta: float,
    accountant: Accountant = "pld",
    sampling: Sampling = "poisson",
    points: int = 20,
) -> list[tuple[int, float]]:
    """(round, epsilon) at about ``points`` equally spaced rounds, the last among them.

    Raises:
        UserError: a value out of range.
    """
    if rounds < 1 or points < 1:
        raise UserError(f"rounds={rounds}, points={points}; expected at least 1")
    chosen = sorted({max(1, round(rounds * (i + 1) / points)) for i in range(points)})
    return [(n, epsilon(sampling_rate, noise_multiplier, n, delta, accountant, sampling)) for n in chosen]


def rounds_within(events: Sequence[Event], following: Event, target: float, delta: float, most: int) -> int:
    """How many releases like ``following`` can come after ``events`` with an epsilon (PLD) of at most ``target``.

    Args:
        events: what was released.
        following: the event of each release to come.
        target: largest epsilon.
        delta: in (0, 1).
        most: more than these are not asked for.
    """

    def fits(count: int, interval: float = INTERVAL) -> bool:
        return epsilon_of([*events, *[following] * count], delta, interval=interval) <= target

    def last(low: int, high: int, interval: float) -> int:
        """The last count that fits, where ``low`` does and ``high`` does not."""
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, interval) else (low, middle)
        return low

    if not fits(1):
        return 0
    if fits(most):
        return most
    found = last(1, most, SEARCH_INTERVAL)
    near = min(most, found + found // 20 + 2)  # wider cells round up: a few more may fit
    return last(near, most, INTERVAL) if near < most and fits(near) else last(found, near, INTERVAL)
