"""Configurations of ``fed-privacy``. No torch.

The parser runs a module's ``if TYPE_CHECKING`` imports to understand its annotations, hence a module without any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from polymodal.errors import UserError

__all__ = ["AuditConfig", "CalibrateConfig", "CurveConfig", "EpsilonConfig", "Releases"]


@dataclass
class Releases:
    """What a run releases: one noisy sum a round."""

    sampling_rate: float | None = None
    """q, probability of a client to take part in a round, 0..1"""
    rounds: int | None = None
    """rounds of the run (T)"""
    delta: float | None = None
    """delta of (epsilon, delta), below 1 / clients (default with --clients: 1 / (10 clients))"""
    clients: int = 0
    """N, for the default of delta and a warning where it is too large (0: not known)"""
    sampling: Literal["poisson", "fixed"] = "poisson"
    """poisson: every client by itself with probability q; fixed: cohorts of one size, without amplification"""

    needed: ClassVar[tuple[str, ...]] = ("sampling_rate", "rounds", "delta")

    def __post_init__(self) -> None:
        if self.clients < 0:
            raise UserError(f"clients={self.clients}; expected the number of clients, or 0 where it is not known")
        if self.delta is None and self.clients:
            self.delta = 1 / (10 * self.clients)

    def check(self) -> None:
        """What is needed must be there.

        Raises:
            UserError: names every option that is missing.
        """
        missing = [f"--{name}" for name in self.needed if getattr(self, name) is None]
        if missing:
            raise UserError(f"{', '.join(missing)} missing; e.g. --sampling_rate 0.1 --rounds 301 --delta 0.002")

    @property
    def how(self) -> dict[str, Any]:
        """Arguments of the accounting functions that all of them take."""
        return {
            "sampling_rate": self.sampling_rate,
            "rounds": self.rounds,
            "delta": self.delta,
            "sampling": self.sampling,
        }


@dataclass
class EpsilonConfig(Releases):
    """Epsilon after so many rounds."""

    noise_multiplier: float | None = None
    """sigma: the noise on the clipped sum has deviation sigma C"""

    needed = ("sampling_rate", "noise_multiplier", "rounds", "delta")


@dataclass
class CalibrateConfig(Releases):
    """The least noise that keeps a target epsilon, rounded up."""

    target_epsilon: float | None = None
    """epsilon after all rounds, at most"""
    accountant: Literal["pld", "rdp"] = "pld"
    """pld: tight; rdp: for comparison with older results"""

    needed = ("target_epsilon", "sampling_rate", "rounds", "delta")


@dataclass
class CurveConfig(Releases):
    """Epsilon by round, for one or several noise multipliers."""

    noise_multiplier: Any = field(default_factory=list)
    """sigma, or several, e.g. 0.6,0.8,1.2"""
    points: int = 20
    """rounds at which epsilon is computed"""
    out: Path | None = None
    """picture to write (.png)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.noise_multiplier
        items = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [given]
        try:
            self.noise_multiplier = [float(item) for item in items]
        except (TypeError, ValueError) as error:
            raise UserError(f"noise_multiplier={given!r}; expected numbers, e.g. 0.6,0.8,1.2") from error
        if self.points < 1:
            raise UserError(f"points={self.points}; expected at least 1")

    def check(self) -> None:
        """As for all, and at least one noise multiplier."""
        super().check()
        if not self.noise_multiplier:
            raise UserError("--noise_multiplier missing; e.g. --noise_multiplier 0.6,0.8,1.2")


@dataclass
class AuditConfig:
    """A lower bound on epsilon from trials with and without a canary client, against the epsilon that is reported."""

    noise_multiplier: float = 1.0
    """sigma"""
    sampling_rate: float = 1.0
    """q, probability of a client to take part"""
    delta: float = 0.01
    """delta of (epsilon, delta)"""
    trials: int = 2000
    """releases with the canary, and as many without"""
    parameters: int = 100
    """numbers of an upload"""
    confidence: float = 0.95
    """probability that the bound holds, 0..1"""
    secure_noise: bool = False
    """audit the noise from the operating system's random bytes"""
