"""Mean, deviation and paired differences over seeds, with Student's t interval.

The t distribution is written out: neither Python's ``statistics`` nor torch has it, and a report needs no SciPy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["PairedDifference", "Summary", "paired_difference", "summarise", "t_quantile"]


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function, by Lentz's algorithm."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 500):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + numerator * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + numerator / c
            c = c if abs(c) > tiny else tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return value


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b) for 0 <= x <= 1."""
    if x <= 0.0 or x >= 1.0:
        return min(max(x, 0.0), 1.0)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x < (a + 1.0) / (a + b + 2.0):
        return math.exp(log_front) * _beta_fraction(a, b, x) / a
    return 1.0 - math.exp(log_front) * _beta_fraction(b, a, 1.0 - x) / b


@lru_cache(maxsize=256)
def t_quantile(confidence: float, df: int) -> float:
    """The t for which ``P(|T| <= t) = confidence`` under Student's t with ``df`` degrees of freedom.

    Args:
        confidence: two-sided coverage, 0 < confidence < 1, e.g. 0.95.
        df: degrees of freedom, at least 1.

    Returns:
        The half-width of the interval in standard errors; 12.706 for (0.95, 1), 1.960 for (0.95, many).

    Raises:
        ValueError: an argument is outside its range.
    """
    if not 0.0 < confidence < 1.0 or df < 1:
        raise ValueError(f"t_quantile({confidence}, {df}); expected 0 < confidence < 1 and df >= 1")
    low, high = 0.0, 1.0
    while _two_sided_tail(high, df) > 1.0 - confidence:
        low, high = high, 2.0 * high
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        if _two_sided_tail(middle, df) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def _two_sided_tail(t: float, df: int) -> float:
    return _incomplete_beta(0.5 * df, 0.5, df / (df + t * t))


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (divisor n - 1; ``None`` for one value) of ``n`` values."""

    n: int
    mean: float
    sd: float | None


def summarise(values: Sequence[float]) -> Summary:
    """Summary of at least one value.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("summarise() needs at least one value")
    return Summary(len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of ``ours - baseline`` over the shared seeds, and its interval (``None`` below two pairs).

    Args:
        n: number of seeds that both sides have.
        mean: mean difference, in the metric's unit.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    n: int
    mean: float
    low: float | None
    high: float | None


def paired_difference(
    ours: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95
) -> PairedDifference | None:
    """Difference by seed with a t-interval.

    Args:
        ours: value per seed.
        baseline: value per seed; seeds that only one side has are left out.
        confidence: two-sided coverage of the interval.

    Returns:
        The difference, or ``None`` if no seed is shared.
    """
    seeds = sorted(ours.keys() & baseline.keys())
    if not seeds:
        return None
    summary = summarise([ours[s] - baseline[s] for s in seeds])
    if summary.sd is None:
        return PairedDifference(1, summary.mean, None, None)
    half = t_quantile(confidence, summary.n - 1) * summary.sd / math.sqrt(summary.n)
    return PairedDifference(summary.n, summary.mean, summary.mean - half, summary.mean + half)
