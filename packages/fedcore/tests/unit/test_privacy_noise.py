"""Noise and cohorts as statistics see them: calibrated, independent, never repeated, never saved."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import warnings

import numpy as np
import pytest
import torch
from fedcore.privacy import NoiseSource
from polymodal.errors import UserError
from scipy import stats

MODES = {"os_seeded": {}, "os_csprng": {"secure": True}, "deterministic": {"test_seed": 3}}


def drawn(source, count, deviation=1.0, round=0):
    total = torch.zeros(count, dtype=torch.float64)
    source.add([total], deviation, round)
    return total


@pytest.mark.parametrize("mode", MODES)
def test_noise_is_gaussian_and_as_large_as_asked(mode):
    source, count, deviation = NoiseSource(**MODES[mode]), 10**6, 0.37
    assert source.mode == mode
    found = drawn(source, count, deviation).numpy() / deviation
    assert abs(found.mean()) < 4 / np.sqrt(count)
    assert found.std() == pytest.approx(1, abs=0.005)
    assert stats.kurtosis(found) == pytest.approx(0, abs=5 * np.sqrt(24 / count))
    assert stats.skew(found) == pytest.approx(0, abs=5 * np.sqrt(6 / count))
    assert stats.kstest(found[:200_000], "norm").pvalue > 1e-4
    assert 4.2 < np.abs(found).max() < 7


@pytest.mark.parametrize("mode", MODES)
def test_rounds_runs_and_tensors_have_noise_of_their_own(mode):
    source, count = NoiseSource(**MODES[mode]), 100_000
    one, two = torch.zeros(count, dtype=torch.float64), torch.zeros(4, count // 4, dtype=torch.float64)
    source.add([one, two], 1.0, 0)
    later = drawn(source, count, round=1)
    other = drawn(NoiseSource(**{**MODES[mode], **({"test_seed": 4} if mode == "deterministic" else {})}), count)
    kinds = [one.numpy(), two.numpy().reshape(-1), later.numpy(), other.numpy()]
    correlation = np.corrcoef(kinds) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(count)
    # Neighbouring numbers, and those a chunk apart.
    for lag in (1, 2, 65536):
        assert abs(np.corrcoef(one[:-lag], one[lag:])[0, 1]) < 5 / np.sqrt(count - lag)


def test_noise_is_added_to_what_is_there():
    total = torch.full((3,), 1000.0, dtype=torch.float64)
    NoiseSource().add([total], 1.0, 0)
    assert bool(((total - 1000).abs() < 10).all())
    kept = total.clone()
    NoiseSource().add([total], 0.0, 0)
    assert torch.equal(total, kept)


def test_only_the_test_switch_repeats():
    assert torch.equal(drawn(NoiseSource(test_seed=1), 50), drawn(NoiseSource(test_seed=1), 50))
    for options in ({}, {"secure": True}):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 (the point: global seeds change nothing)
        source = NoiseSource(**options)
        one = drawn(source, 50)
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        assert not torch.equal(one, drawn(source, 50))
        assert source.poisson(500, 0.5, 0) != source.poisson(500, 0.5, 0)
        assert source.fixed(500, 200, 0) != source.fixed(500, 200, 0)


def _draw_in_a_process(connection, source):
    connection.send((drawn(source, 8).tolist(), source.poisson(64, 0.5, 0)))
    connection.close()


def test_two_processes_with_the_same_seeds_draw_different_noise():
    # Forked from one parent: even what was in its memory is the same.
    context, source, found = multiprocessing.get_context("fork"), NoiseSource(), []
    drawn(source, 8)
    for _ in range(2):
        torch.manual_seed(0)
        here, there = context.Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            process = context.Process(target=_draw_in_a_process, args=(there, source))
            process.start()
        assert here.poll(60)
        found.append(here.recv())
        process.join()
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_a_source_is_never_saved():
    for function in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never saved"):
            function(NoiseSource())


def test_both_switches_at_once_are_refused():
    with pytest.raises(UserError, match="exclude each other"):
        NoiseSource(secure=True, test_seed=0)


# ------------------------------------------------------------------ cohorts


@pytest.mark.parametrize("mode", MODES)
def test_poisson_cohorts_have_the_right_frequencies_and_no_covariance(mode):
    clients, q, rounds = 40, 0.2, 4000
    source = NoiseSource(**MODES[mode])
    member = np.zeros((rounds, clients))
    for round in range(rounds):
        ids = source.poisson(clients, q, round)
        assert ids == sorted(set(ids))
        member[round, ids] = 1
    error = np.sqrt(q * (1 - q) / rounds)
    assert np.abs(member.mean(axis=0) - q).max() < 5 * error
    size = member.sum(axis=1)
    variance = clients * q * (1 - q)
    assert size.var() == pytest.approx(variance, rel=5 * np.sqrt(2 / rounds))
    assert size.mean() == pytest.approx(clients * q, abs=5 * np.sqrt(variance / rounds))
    covariance = np.cov(member.T) - np.diag(member.var(axis=0, ddof=1))
    assert np.abs(covariance).max() < 5.5 * q * (1 - q) / np.sqrt(rounds)
    # The mean over all pairs is where "draw a size, then choose as many" would still look right; the sum is not.
    assert abs(covariance.sum()) < 5 * np.sqrt(2 * clients * (clients - 1)) * q * (1 - q) / np.sqrt(rounds)
    assert np.abs(np.corrcoef(member[1:].ravel(), member[:-1].ravel())[0, 1]) < 5 / np.sqrt(member.size)


def test_certain_and_impossible_members():
    source = NoiseSource()
    assert source.poisson(7, 1.0, 0) == list(range(7))
    assert NoiseSource(secure=True).poisson(7, 1.0, 0) == list(range(7))
    assert any(not source.poisson(3, 0.05, 0) for _ in range(100))


@pytest.mark.parametrize("mode", MODES)
def test_fixed_cohorts_have_one_size(mode):
    source = NoiseSource(**MODES[mode])
    counts = np.zeros(10)
    for round in range(2000):
        ids = source.fixed(10, 3, round)
        assert ids == sorted(set(ids))
        assert len(ids) == 3
        counts[ids] += 1
    assert np.abs(counts / 2000 - 0.3).max() < 5 * np.sqrt(0.21 / 2000)
