"""Student's t and the summaries against published tables and independent formulas."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from polymodal.stats import paired_difference, summarise, t_quantile

# Two-sided 95 % and 99 % points from a printed table of Student's t.
TABLE = {
    (0.95, 1): 12.7062,
    (0.95, 2): 4.3027,
    (0.95, 4): 2.7764,
    (0.95, 9): 2.2622,
    (0.95, 30): 2.0423,
    (0.95, 120): 1.9799,
    (0.99, 1): 63.6567,
    (0.99, 5): 4.0321,
    (0.99, 29): 2.7564,
    (0.90, 3): 2.3534,
}


@pytest.mark.parametrize(("confidence", "df"), TABLE)
def test_quantile_agrees_with_the_printed_table(confidence, df):
    assert t_quantile(confidence, df) == pytest.approx(TABLE[confidence, df], abs=6e-5)


@given(st.floats(0.01, 0.999))
def test_quantile_agrees_with_the_closed_forms_of_one_and_two_degrees(confidence):
    assert t_quantile(confidence, 1) == pytest.approx(math.tan(math.pi * confidence / 2), rel=1e-9)
    assert t_quantile(confidence, 2) == pytest.approx(confidence * math.sqrt(2 / (1 - confidence**2)), rel=1e-9)


def test_quantile_tends_to_the_normal_distribution():
    normal = statistics.NormalDist().inv_cdf(0.975)
    assert t_quantile(0.95, 10**7) == pytest.approx(normal, abs=1e-6)
    assert t_quantile(0.95, 100) > normal


@pytest.mark.parametrize(("confidence", "df"), [(0.0, 3), (1.0, 3), (0.95, 0)])
def test_quantile_refuses_what_has_no_answer(confidence, df):
    with pytest.raises(ValueError, match="expected"):
        t_quantile(confidence, df)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8))
def test_summary_is_the_sample_mean_and_deviation(values):
    summary = summarise(values)
    assert summary.n == len(values)
    assert summary.mean == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-9)
    assert summary.sd == pytest.approx(statistics.stdev(values), rel=1e-6, abs=1e-6)


def test_one_value_has_no_deviation_and_none_is_an_error():
    assert summarise([3.0]).sd is None
    with pytest.raises(ValueError, match="at least one"):
        summarise([])


def test_paired_difference_of_known_numbers():
    # Differences 1, 2, 3: mean 2, sd 1, standard error 1/sqrt(3), t(0.95, 2) = 4.3027.
    difference = paired_difference({0: 11.0, 1: 22.0, 2: 33.0, 9: 5.0}, {0: 10.0, 1: 20.0, 2: 30.0, 7: 4.0})
    half = 4.302652729749459 / math.sqrt(3)
    assert difference.n == 3
    assert difference.mean == 2.0
    assert difference.low == pytest.approx(2 - half, rel=1e-9)
    assert difference.high == pytest.approx(2 + half, rel=1e-9)


def test_paired_difference_without_enough_pairs():
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    one = paired_difference({0: 3.0, 1: 9.0}, {0: 1.0})
    assert (one.n, one.mean, one.low, one.high) == (1, 2.0, None, None)


@given(st.dictionaries(st.integers(0, 9), st.floats(-100, 100), min_size=2), st.floats(-50, 50))
def test_a_constant_shift_leaves_an_interval_of_no_width(baseline, shift):
    difference = paired_difference({seed: value + shift for seed, value in baseline.items()}, baseline)
    assert difference.low == pytest.approx(shift, abs=1e-9)
    assert difference.high == pytest.approx(shift, abs=1e-9)
