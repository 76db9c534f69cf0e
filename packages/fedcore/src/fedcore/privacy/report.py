"""What a guarantee says, in the words and numbers that stand beside every result."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["UNACCOUNTED", "PrivacyReport"]

UNIT = "one client: all its data, all rounds"
UNACCOUNTED = (
    "choice of hyper-parameters: every run on the same clients is a release of its own",
    "metrics on validation and test sets: about the released model, but nothing protects those sets themselves",
    "partition facts (clients, their sizes and labels), run times and traffic, where they are published",
    "checkpoints hold the states of clients where the method keeps some: server side only, not for publication",
)
ASSUMPTIONS = (
    "the server is trusted; an adversary sees every released model and everything made of it",
    "the model that training began with owes nothing to the clients' data",
)


@dataclass(frozen=True)
class PrivacyReport:
    """The guarantee of the events in a ledger.

    Args:
        epsilon: by PLD; infinite where there is no guarantee.
        epsilon_rdp: by RDP, for comparison.
        delta: of both.
        adjacency: which data sets the guarantee compares.
        releases: events, one a released vector.
        noise_multiplier: sigma of the run as it is set up now (NaN: not chosen yet).
        noise_multipliers: every sigma in the ledger.
        clip: C of the run as it is set up now.
        clip_mode: how uploads are clipped.
        noise_location: ``server`` or ``client``.
        sampling: ``poisson`` or ``fixed``.
        sampling_rate: q.
        clients: N.
        expected_cohort: m, the fixed denominator.
        random: mode of the noise source.
        library: accounting library with its version.
        reasons: why epsilon is infinite.
        warnings: what makes the guarantee weak.
        unaccounted: releases that epsilon does not cover.
        assumptions: what it rests on.
        unsafe_metrics: whether what is not private was written too.
        accountant: of ``epsilon``.
        unit: what is protected.
    """

    epsilon: float
    epsilon_rdp: float
    delta: float
    adjacency: str
    releases: int
    noise_multiplier: float
    noise_multipliers: tuple[float, ...]
    clip: float
    clip_mode: str
    noise_location: str
    sampling: str
    sampling_rate: float
    clients: int
    expected_cohort: float
    random: str
    library: str
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    unaccounted: tuple[str, ...] = UNACCOUNTED
    assumptions: tuple[str, ...] = ASSUMPTIONS
    unsafe_metrics: bool = False
    accountant: str = "PLD"
    unit: str = UNIT

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite, which JSON cannot say, is the text ``inf`` or ``nan``."""
        found: dict[str, Any] = {"schema": "fedcore.privacy_report", "schema_version": 1}
        for item in fields(self):
            value = getattr(self, item.name)
            found[item.name] = [_plain(part) for part in value] if isinstance(value, tuple) else _plain(value)
        return found

    @property
    def lines(self) -> list[str]:
        """The report as lines of text."""
        how = f"each with probability {self.sampling_rate:g}" if self.sampling == "poisson" else "cohorts of one size"
        sigma = ", ".join(f"{value:g}" for value in self.noise_multipliers) or f"{self.noise_multiplier:g}"
        lines = [
            f"privacy     epsilon = {self.epsilon:.4g} at delta = {self.delta:.3g} ({self.accountant}; "
            f"RDP {self.epsilon_rdp:.4g}), {self.library}",
            f"protects    {self.unit}; adjacency: {self.adjacency}",
            f"mechanism   {self.releases} releases, sigma {sigma}, C {self.clip:g} ({self.clip_mode}), "
            f"noise added by the {self.noise_location}, {self.random}",
            f"cohorts     of {self.clients} clients, {how}; {self.expected_cohort:g} expected",
        ]
        if self.unsafe_metrics:
            lines.append("UNSAFE      this run also wrote what is not private: losses, cohorts, norms of uploads")
        for title, texts in (
            ("NO PRIVACY", self.reasons),
            ("warning", self.warnings),
            ("assumes", self.assumptions),
            ("not counted", self.unaccounted),
        ):
            lines += [f"{title:<11} {text}" for text in texts]
        return lines

    def text(self) -> str:
        """The report as one text."""
        return "\n".join(self.lines)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
