"""Trajectories and moments of the adaptive servers against float64 NumPy, and what they are at the edges."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from fedcore.algorithms import create


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_server{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


softmax, run, reference = _load("_softmax"), _load("_run"), _load("_server_reference")

KINDS = ["fedadam", "fedyogi", "fedadagrad"]
OPTIONS = [
    {},
    {"bias_correction": True},
    {"eta_s": 0.1, "b1": 0.5, "b2": 0.7, "tau": 0.02, "v0": 0.0, "bias_correction": True},
    {"eta_s": 0.03, "b1": 0.0, "b2": 0.9, "v0": 0.01},
]
PARTIAL = [[0, 3], [1, 2, 4], [3], [0, 1, 4], [2, 3]]
SCENARIOS = [
    ({"lr": 0.2, "clip_grad": 0.4}, {"cohorts": [[0, 1, 2, 3, 4]] * 4}),
    ({"weight_decay": 0.05, "lr_decay": 0.9}, {"cohorts": PARTIAL, "weighting": "samples"}),
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=["all", "partial"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_trajectory(kind, options, scenario):
    base, shape = scenario
    problem = softmax.make(seed=9)
    thetas, m, v = reference.run(kind, softmax, problem, **base, **shape, **options)
    found, sim = run.trajectory(create(kind, **base, **options), problem, **shape)
    for theta, wanted in zip(found, thetas, strict=True):
        np.testing.assert_allclose(theta, wanted, rtol=0, atol=1e-12)
    assert sorted(sim.server_state) == ["m", "v"]
    np.testing.assert_allclose(sim.server_state["m"].numpy(), m, rtol=0, atol=1e-13)
    np.testing.assert_allclose(sim.server_state["v"].numpy(), v, rtol=0, atol=1e-13)
    assert not sim.client_states


def test_the_cases_differ():
    """No two cases give the same trajectory in the reference, except where b1 = 0 leaves nothing to correct."""
    problem, ends = softmax.make(seed=9), {}
    for kind in KINDS:
        for options in OPTIONS:
            thetas, _, _ = reference.run(kind, softmax, problem, PARTIAL, **options)
            ends[kind, str(options)] = np.concatenate(thetas)
    keys = list(ends)
    for i, one in enumerate(keys):
        for other in keys[:i]:
            uncorrected = one[0] == other[0] == "fedadagrad" and {one[1], other[1]} == {str(o) for o in OPTIONS[:2]}
            assert (np.abs(ends[one] - ends[other]).max() < 1e-7) == uncorrected, (one, other)


@pytest.mark.parametrize("kind", ["fedadam", "fedyogi"])
def test_a_constant_denominator_is_fedavg(kind):
    problem = softmax.make(seed=10)
    options = {"eta_s": 1.0, "b1": 0.0, "b2": 1.0, "v0": 1.0, "tau": 1e-300}
    one, _ = run.trajectory(create(kind, **options), problem, cohorts=PARTIAL)
    other, _ = run.trajectory(create("fedavg"), problem, cohorts=PARTIAL)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_first_round_of_yogi_is_adams_from_zero():
    problem = softmax.make(seed=11)
    one, _ = run.trajectory(create("fedadam", v0=0.0), problem, rounds=2)
    other, _ = run.trajectory(create("fedyogi", v0=0.0), problem, rounds=2)
    np.testing.assert_allclose(one[0], other[0], rtol=0, atol=1e-14)
    assert np.abs(one[1] - other[1]).max() > 1e-6
