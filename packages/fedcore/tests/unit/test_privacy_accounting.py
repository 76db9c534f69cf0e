"""Epsilon against published goldens, closed forms and an own integration; bounds, calibration, refusals."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from fedcore.privacy import Event, calibrate, curve, epsilon, epsilon_of
from fedcore.privacy.accounting import QUICK_INTERVAL, rounds_within
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from scipy.optimize import brentq
from scipy.special import gammaln, logsumexp
from scipy.stats import norm

# q, sigma, rounds, delta, PLD, RDP (dp-accounting), RDP without amplification, RDP of a fixed cohort (replace one)
GOLDEN = [
    (0.1, 0.8, 301, 1 / 500, 13.488, 15.933, 310.6, 736.3),
    (0.1, 0.95, 300, 1 / 500, 9.373, 10.834, 227.8, 300.8),
    (0.1, 0.8, 301, 1e-5, 19.352, 21.268, 337.0, 741.6),
    (0.05, 1.0, 100, 1e-5, 3.502, 4.039, 96.1, 34.3),
    (1.0, 5.0, 50, 1e-5, 6.573, 7.077, 7.077, None),
]


def event(round=0, sigma=1.0, rate=1.0, sampling="poisson", **options):
    return Event(round, sampling, rate, sigma, 1.0, 100, 10, **options)


def gaussian_epsilon(mu, delta):
    """Of Gaussians whose sensitivity over deviation adds up, squared, to mu^2 (Balle and Wang 2018)."""

    def excess(eps):
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps + norm.logcdf(-mu / 2 - eps / mu)) - delta

    return brentq(excess, 0, mu * mu / 2 + 20 * mu)


def renyi_epsilon(q, sigma, rounds, delta):
    """Integer orders, in logarithms."""
    best = math.inf
    for a in range(2, 200):
        k = np.arange(a + 1)
        choose = gammaln(a + 1) - gammaln(k + 1) - gammaln(a - k + 1)
        terms = choose + (a - k) * math.log1p(-q) + k * math.log(q) + (k * k - k) / (2 * sigma**2)
        rdp = rounds * logsumexp(terms) / (a - 1)
        best = min(best, rdp + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1))
    return best


def sampled_epsilon(q, sigma, delta):
    """One Poisson release, the worse of adding and removing, by integration."""
    x = np.linspace(-12 * sigma, 1 + 12 * sigma, 200_001)
    without, joined = norm.pdf(x, 0, sigma), (1 - q) * norm.pdf(x, 0, sigma) + q * norm.pdf(x, 1, sigma)

    def excess(eps):
        pairs = ((joined, without), (without, joined))
        return max(np.trapezoid(np.maximum(p - math.exp(eps) * r, 0), x) for p, r in pairs) - delta

    return brentq(excess, 0, 20)


@pytest.mark.parametrize("row", [*GOLDEN[:2], pytest.param(GOLDEN[2], marks=pytest.mark.slow), *GOLDEN[3:]])
def test_pld_gives_the_golden_values(row):
    assert epsilon(*row[:4]) == pytest.approx(row[4], rel=0.01)


@pytest.mark.parametrize("row", GOLDEN)
def test_rdp_without_amplification_gives_the_golden_values(row):
    assert epsilon(1.0, *row[1:4], accountant="rdp") == pytest.approx(row[6], rel=0.01)


@pytest.mark.parametrize("row", [GOLDEN[3], *(pytest.param(row, marks=pytest.mark.slow) for row in GOLDEN[:3])])
def test_rdp_gives_the_golden_values_and_is_no_tighter_than_an_own_formula_says(row):
    found = epsilon(*row[:4], accountant="rdp")
    assert found == pytest.approx(row[5], rel=0.01)
    assert found == pytest.approx(renyi_epsilon(*row[:4]), rel=0.02)


@pytest.mark.parametrize("row", [GOLDEN[3], *(pytest.param(row, marks=pytest.mark.slow) for row in GOLDEN[:3])])
def test_draws_without_replacement_count_sigma_against_the_replace_one_sensitivity(row):
    found = epsilon(*row[:4], accountant="rdp", sampling="without_replacement")
    assert found == pytest.approx(row[7], rel=0.01)


def test_fixed_cohorts_are_not_amplified_and_have_twice_the_sensitivity():
    for sigma, rounds, delta in ((0.8, 301, 1 / 500), (5.0, 50, 1e-5)):
        expected = gaussian_epsilon(2 * math.sqrt(rounds) / sigma, delta)
        assert epsilon(0.1, sigma, rounds, delta, sampling="fixed") == pytest.approx(expected, rel=2e-3)


def test_everybody_takes_part_is_the_closed_form():
    assert epsilon(1.0, 5.0, 50, 1e-5) == pytest.approx(gaussian_epsilon(math.sqrt(50) / 5, 1e-5), rel=1e-3)


@pytest.mark.parametrize(("q", "sigma", "delta"), [(0.1, 0.8, 1e-3), (0.3, 1.5, 1e-4)])
def test_one_poisson_round_against_an_integration(q, sigma, delta):
    assert epsilon(q, sigma, 1, delta) == pytest.approx(sampled_epsilon(q, sigma, delta), rel=2e-3)


@settings(deadline=None, max_examples=8)
@given(
    q=st.floats(0.01, 1.0),
    sigma=st.floats(0.6, 5.0),
    rounds=st.integers(1, 60),
    delta=st.floats(1e-7, 1e-2),
    more=st.floats(1.05, 2.0),
)
def test_epsilon_grows_with_rounds_and_rate_and_falls_with_noise_and_delta(q, sigma, rounds, delta, more):
    def at(q=q, sigma=sigma, rounds=rounds, delta=delta):
        events = [event(rate=min(1.0, q), sigma=sigma)] * rounds
        return epsilon_of(events, min(delta, 0.9), interval=QUICK_INTERVAL)

    base, slack = at(), 2e-3
    assert at(rounds=rounds + 3) >= base * (1 - slack)
    assert at(q=q * more) >= base * (1 - slack)
    assert at(sigma=sigma * more) <= base * (1 + slack) + slack
    assert at(delta=delta * more) <= base * (1 + slack) + slack


def test_wider_cells_round_up_and_by_little():
    events = [event(rate=0.1, sigma=0.95)] * 100
    fine, coarse = epsilon_of(events, 1e-3), epsilon_of(events, 1e-3, interval=QUICK_INTERVAL)
    assert fine - 1e-6 <= coarse <= fine * 1.001


# ------------------------------------------------------------------ ledgers


def test_a_sigma_that_changes_is_composed_as_it_was():
    events = [event(sigma=2.0)] * 3 + [event(sigma=4.0)] * 5
    mu = math.sqrt(3 / 4 + 5 / 16)
    assert epsilon_of(events, 1e-5) == pytest.approx(gaussian_epsilon(mu, 1e-5), rel=1e-3)
    assert epsilon_of(events[::-1], 1e-5) == epsilon_of(events, 1e-5)


def test_cohorts_of_both_kinds_are_bounded_by_replace_one_without_amplification():
    events = [event(rate=0.1, sigma=2.0), event(rate=0.1, sigma=4.0, sampling="fixed")]
    mu = 2 * math.sqrt(1 / 4 + 1 / 16)
    assert epsilon_of(events, 1e-5) == pytest.approx(gaussian_epsilon(mu, 1e-5), rel=1e-3)


def test_one_event_without_guarantee_spoils_all():
    assert epsilon_of([event()] * 3, 1e-5) < math.inf
    assert epsilon_of([event(), event(reasons=("no",)), event()], 1e-5) == math.inf
    assert epsilon_of([event(), event(sigma=0.0)], 1e-5) == math.inf
    assert epsilon_of([], 1e-5) == 0.0


def test_rounds_within_a_budget():
    following = event(sigma=4.0)

    def spent(count):
        return gaussian_epsilon(math.sqrt(count) / 4, 1e-5)

    target = (spent(6) + spent(7)) / 2
    assert rounds_within([], following, target, 1e-5, 20) == 6
    assert rounds_within([following] * 4, following, target, 1e-5, 20) == 2
    assert rounds_within([following] * 6, following, target, 1e-5, 20) == 0
    assert rounds_within([], following, target, 1e-5, 5) == 5


# ------------------------------------------------------------------ calibration


@pytest.mark.parametrize(("q", "target", "rounds"), [(1.0, 2.0, 10), (0.1, 3.0, 5)])
def test_calibrated_noise_keeps_the_target_and_no_more_than_needed(q, target, rounds):
    sigma = calibrate(target, q, rounds, 1e-4)
    assert sigma * 1e4 == pytest.approx(round(sigma * 1e4), abs=1e-6)
    assert epsilon(q, sigma, rounds, 1e-4) <= target
    assert epsilon(q, sigma - 3e-4, rounds, 1e-4) > target


def test_a_curve_ends_with_the_last_round():
    found = curve(1.0, 5.0, 50, 1e-5, points=4)
    assert [n for n, _ in found] == [12, 25, 38, 50]
    assert [e for _, e in found] == sorted(e for _, e in found)
    assert found[-1][1] == epsilon(1.0, 5.0, 50, 1e-5)


# ------------------------------------------------------------------ limits


def test_no_noise_is_no_privacy_and_no_round_costs_nothing():
    assert epsilon(0.1, 0.0, 10, 1e-5) == math.inf
    assert epsilon(0.1, 1.0, 0, 1e-5) == 0.0


def test_very_little_noise_is_still_bounded_without_gigabytes():
    assert 1e3 < epsilon(0.1, 0.02, 100, 1e-5) < 1e6
    assert epsilon(0.1, 1e-4, 100, 1e-5) > 1e5


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((0.0, 1.0, 1, 0.1), "sampling_rate"),
        ((1.1, 1.0, 1, 0.1), "sampling_rate"),
        ((math.nan, 1.0, 1, 0.1), "sampling_rate"),
        ((0.1, -1.0, 1, 0.1), "noise_multiplier"),
        ((0.1, 1.0, -1, 0.1), "rounds"),
        ((0.1, 1.0, 1.5, 0.1), "rounds"),
        ((0.1, 1.0, 1, 0.0), "delta"),
        ((0.1, 1.0, 1, 1.0), "delta"),
        ((0.1, 1.0, 1, 0.1, "prv"), "accountant"),
        ((0.1, 1.0, 1, 0.1, "pld", "sometimes"), "sampling"),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(arguments, word):
    with pytest.raises(UserError, match=word) as caught:
        epsilon(*arguments)
    assert "\n" not in str(caught.value)


def test_impossible_targets_are_refused():
    for target in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="target_epsilon"):
            calibrate(target, 0.1, 10, 1e-5)
    with pytest.raises(UserError, match="without replacement"):
        epsilon(0.1, 1.0, 1, 1e-5, sampling="without_replacement")


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match="pip install") as caught:
        epsilon(0.123, 1.0, 7, 1e-5)
    assert "\n" not in str(caught.value)
