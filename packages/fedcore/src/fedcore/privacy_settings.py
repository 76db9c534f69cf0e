"""Client-level differential privacy as options of the commands. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polymodal.errors import UserError

__all__ = ["PrivacyConfig"]


@dataclass
class PrivacyConfig:
    """Client-level differential privacy; used by the algorithms whose names begin with dp_ or fed_smp."""

    clip: float | None = None
    """C, largest norm of a client's upload over all its numbers; a public constant, needed"""
    noise_multiplier: float | None = None
    """sigma: the noise on the sum has deviation sigma C"""
    target_epsilon: float | None = None
    """sigma is chosen for this epsilon after all rounds; with noise_multiplier: stop before a round that exceeds it"""
    delta: float | None = None
    """delta of (epsilon, delta) (default: 1 / (10 clients))"""
    sampling: Literal["poisson", "fixed"] = "poisson"
    """poisson: each client takes part with probability fraction; fixed: cohorts of one size, without amplification"""
    clip_mode: Literal["flat", "per_layer", "official_median"] = "flat"
    """flat: one norm; per_layer: C / sqrt(L) each; official_median: as the authors' script, not private"""
    noise_location: Literal["server", "client"] = "server"
    """client: each client adds its share; needs secure aggregation and fixed cohorts"""
    secure_noise: bool = False
    """noise from the operating system's random bytes, four draws summed, slower"""
    unsafe_debug_metrics: bool = False
    """also write what is not private: training loss, cohort, share of clipped uploads; epsilon is then infinite"""
    deterministic_noise_for_tests: bool = False
    """noise from the run's seed, for tests of exact resume; epsilon is then infinite"""

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("clip", self.clip is None or self.clip > 0, "more than 0"),
            ("noise_multiplier", self.noise_multiplier is None or self.noise_multiplier >= 0, "0 or more"),
            ("target_epsilon", self.target_epsilon is None or self.target_epsilon > 0, "more than 0"),
            ("delta", self.delta is None or 0 < self.delta < 1, "0 < delta < 1"),
        ):
            if not good:
                raise UserError(f"privacy.{name}={getattr(self, name)}; expected {expected}")
