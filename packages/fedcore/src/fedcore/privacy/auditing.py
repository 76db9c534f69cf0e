"""Empirical audit: how well can an adversary tell whether a canary client took part?

A mechanism that forgets its noise, or adds too little, lets the adversary tell better than the reported epsilon allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from polymodal.errors import UserError

from fedcore.algorithm import Client
from fedcore.engines.base import ClientResult
from fedcore.privacy.accounting import epsilon
from fedcore.privacy.mechanism import ClientDPMechanism, MechanismSettings
from fedcore.privacy.noise import NoiseSource

if TYPE_CHECKING:
    from fedcore.algorithm import Tree

__all__ = ["AuditResult", "audit", "epsilon_bound"]

OTHERS = 3
"""further clients, whose uploads are orthogonal to the canary's"""
Array = npt.NDArray[np.float64]
Mechanism = Callable[[MechanismSettings, "Tree", NoiseSource, Callable[[int], None]], ClientDPMechanism]


@dataclass(frozen=True)
class AuditResult:
    """Outcome of an audit.

    Args:
        epsilon_bound: with the given confidence, epsilon is at least this.
        epsilon_reported: what the accountant says.
        delta: of both.
        trials: runs with the canary, and as many without.
        confidence: of the bound.
        threshold: what the adversary compares the release with, in units of C.
        hits: share of runs with the canary in which it says so.
        false_alarms: share of runs without.
    """

    epsilon_bound: float
    epsilon_reported: float
    delta: float
    trials: int
    confidence: float
    threshold: float
    hits: float
    false_alarms: float

    @property
    def passed(self) -> bool:
        """Whether the bound does not contradict the report."""
        return self.epsilon_bound <= self.epsilon_reported

    def text(self) -> str:
        """One paragraph."""
        verdict = "consistent" if self.passed else "VIOLATED: the noise is not what the accountant was told"
        return (
            f"audit: epsilon >= {self.epsilon_bound:.3f} with {100 * self.confidence:g} % confidence "
            f"({self.trials} runs with a canary client, hit rate {self.hits:.3f}, and as many without, false alarms "
            f"{self.false_alarms:.3f}); "
            f"reported epsilon = {self.epsilon_reported:.3f} at delta = {self.delta:g}; {verdict}"
        )


def audit(
    noise_multiplier: float = 1.0,
    clip: float = 1.0,
    sampling_rate: float = 1.0,
    delta: float = 0.01,
    trials: int = 2000,
    parameters: int = 100,
    confidence: float = 0.95,
    secure_noise: bool = False,
    mechanism: Mechanism = ClientDPMechanism,
) -> AuditResult:
    """Run one release ``trials`` times with a canary client and as often without, through the real mechanism.

    The canary uploads ten times C along one direction, the others are orthogonal to it: the hardest case for the
    mechanism, and the adversary knows all of it. Half of the runs choose the threshold, the other half measure it.

    Args:
        noise_multiplier: sigma.
        clip: C.
        sampling_rate: q; each client takes part with this probability.
        delta: of epsilon.
        trials: of each kind, at least 100.
        parameters: length of an upload, at least 2.
        confidence: of the bound on epsilon, two-sided over both error rates.
        secure_noise: use the slower source of noise.
        mechanism: what is audited.

    Raises:
        UserError: a value out of range.
    """
    if trials < 100 or parameters < 2 or not 0 < confidence < 1 or not clip > 0:
        raise UserError("audit: expected trials >= 100, parameters >= 2, 0 < confidence < 1 and clip > 0")
    reported = epsilon(sampling_rate, noise_multiplier, 1, delta)
    source = NoiseSource(secure=secure_noise)
    settings = MechanismSettings(clip, noise_multiplier, sampling_rate * (OTHERS + 1), 1)
    uploads = _uploads(parameters, clip)

    def statistic(canary: bool) -> float:
        """The sum along the canary's direction, in units of C."""
        cohort = source.poisson(OTHERS + 1, sampling_rate, 0)
        chosen = mechanism(settings, {"delta": uploads[0]}, source, lambda numbers: None)
        for client in cohort:
            if client or canary:  # client 0 is the canary
                chosen.add(ClientResult(Client(client, 1, 1), {"delta": uploads[client]}))
        return float(chosen.result()["delta"][0]) * settings.denominator / clip

    present = np.array([statistic(True) for _ in range(trials)])
    absent = np.array([statistic(False) for _ in range(trials)])
    half = trials // 2
    threshold = _best_threshold(present[:half], absent[:half], delta, confidence)
    hits, alarms = present[half:] > threshold, absent[half:] > threshold
    bound = epsilon_bound(int(hits.sum()), int(alarms.sum()), trials - half, delta, confidence)
    rates = float(hits.mean()), float(alarms.mean())
    return AuditResult(bound, reported, delta, trials, confidence, threshold, *rates)


def _uploads(parameters: int, clip: float) -> list[torch.Tensor]:
    """The canary's upload, ten C along the first coordinate, then the others' along the rest."""
    found = []
    for client in range(OTHERS + 1):
        upload = torch.zeros(parameters)
        upload[0 if client == 0 else 1 + (client - 1) % (parameters - 1)] = 10 * clip
        found.append(upload)
    return found


def _best_threshold(present: Array, absent: Array, delta: float, confidence: float) -> float:
    """The threshold with the highest bound."""
    one, other = np.sort(present), np.sort(absent)
    count = len(one)
    candidates = np.quantile(other, np.linspace(0.5, 1.0, 40))
    bounds = [epsilon_bound(int((one > t).sum()), int((other > t).sum()), count, delta, confidence) for t in candidates]
    return float(candidates[int(np.argmax(bounds))])


def epsilon_bound(hits: int, alarms: int, trials: int, delta: float, confidence: float) -> float:
    """Lower bound of epsilon from the error rates of one test: ``log((TPR - delta) / FPR)``, at least 0.

    Both rates are replaced by their Clopper-Pearson bounds, each with half of the error that is allowed.

    Args:
        hits: runs with the canary in which the adversary says so, of ``trials``.
        alarms: runs without the canary in which it says so, of ``trials``.
        trials: runs of each kind.
        delta: of epsilon.
        confidence: of the bound.
    """
    from scipy.stats import beta

    error = (1 - confidence) / 2
    least = float(beta.ppf(error, hits, trials - hits + 1)) if hits else 0.0
    most = float(beta.ppf(1 - error, alarms + 1, trials - alarms)) if alarms < trials else 1.0
    return max(0.0, math.log((least - delta) / most)) if least > delta else 0.0
