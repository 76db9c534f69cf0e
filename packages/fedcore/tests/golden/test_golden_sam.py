"""Trajectories and states of the sharpness-aware methods against float64 NumPy, and what they are at r = 0."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from fedcore.algorithms import create


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_sam{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


softmax, run, reference = _load("_softmax"), _load("_run"), _load("_sam_reference")

CASES = [
    ("fedsam", {}),
    ("fedsam", {"r": 0.6}),
    ("fedasam", {}),
    ("fedasam", {"r": 0.9, "a": 0.0}),
    ("mofedsam", {}),
    ("mofedsam", {"r": 0.4, "beta": 0.7}),
    ("fedlesam", {}),
    ("fedlesam", {"r": 0.8}),
    ("fedgamma", {}),
    ("fedgamma", {"r": 0.5}),
    ("fednsam", {}),
    ("fednsam", {"r": 0.5, "lam": 0.4, "b": 0.3}),
    ("fedspeed", {"dual_mean": "cohort"}),
    ("fedspeed", {"r": 0.5, "alpha": 0.4, "lam": 3.0, "dual_mean": "cohort"}),
]
UNIFORM_ONLY = [("fedspeed", {}), ("fedspeed", {"r": 0.3, "alpha": 0.8, "lam": 5.0})]
PARTIAL = [[0, 3], [1, 2, 4], [3], [0, 1, 4], [2, 3]]
SCENARIOS = {
    "all": ({"lr": 0.2}, {"cohorts": [[0, 1, 2, 3, 4]] * 4}),
    "partial": ({"round_lr": "constant", "weight_decay": 0.05, "clip_grad": 0.0}, {"cohorts": PARTIAL}),
    "clipped": (
        {"round_lr": "cosine", "clip_grad": 0.5, "weight_decay": 0.02},
        {"cohorts": PARTIAL, "max_steps": 5, "loss_scale": 1.5},
    ),
    "by size": ({"lr": 0.15}, {"cohorts": PARTIAL, "weighting": "samples"}),
}
ATOL = 1e-12


def check(name, options, scenario):
    base, shape = SCENARIOS[scenario]
    problem = softmax.make(seed=5)
    shared = {"scale" if key == "loss_scale" else key: value for key, value in shape.items()}
    expected = getattr(reference, name)(reference.Setting(softmax, problem, **base, **shared), **options)
    found, sim = run.trajectory(create(name, **base, **options), problem, **shape)
    for theta, wanted in zip(found, expected.thetas, strict=True):
        np.testing.assert_allclose(theta, wanted, rtol=0, atol=ATOL)
    same_states({0: sim.server_state}, {0: expected.server})
    same_states(sim.client_states, expected.clients)


def same_states(found, expected):
    assert sorted(found) == sorted(expected)
    for key, tree in expected.items():
        assert sorted(found[key]) == sorted(tree)
        for name, value in tree.items():
            np.testing.assert_allclose(found[key][name].numpy(), value, rtol=0, atol=ATOL)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_trajectory(name, options, scenario):
    check(name, options, scenario)


@pytest.mark.parametrize("scenario", ["all", "partial", "clipped"])
@pytest.mark.parametrize(("name", "options"), UNIFORM_ONLY, ids=str)
def test_trajectory_under_uniform_weights(name, options, scenario):
    check(name, options, scenario)


def test_the_cases_differ():
    """No two cases give the same trajectory in the reference."""
    problem, ends = softmax.make(seed=5), {}
    for name, options in [*CASES, *UNIFORM_ONLY, ("fedsam", {"r": 1e-9})]:
        result = getattr(reference, name)(reference.Setting(softmax, problem, PARTIAL, lr=0.2), **options)
        ends[name, str(options)] = np.concatenate(result.thetas)
    keys = list(ends)
    for i, one in enumerate(keys):
        for other in keys[:i]:
            assert np.abs(ends[one] - ends[other]).max() > 1e-4, (one, other)


EQUAL = [
    (("fedsam", {"r": 0.0}), ("fedavg", {})),
    (("fedasam", {"r": 0.0}), ("fedavg", {})),
    (("fedlesam", {"r": 0.0}), ("fedavg", {})),
    (("mofedsam", {"r": 0.0, "beta": 0.3}), ("fedcm", {"beta": 0.3})),
    (("mofedsam", {"r": 0.2, "beta": 1.0}), ("fedsam", {"r": 0.2})),
    (("fedgamma", {"r": 0.0}), ("scaffold", {})),
    (("fednsam", {"r": 0.0, "lam": 0.7}), ("fedacg", {"lam": 0.7, "b": 0.0})),
    (("fednsam", {"r": 0.2, "lam": 0.0}), ("fedsam", {"r": 0.2})),
]


@pytest.mark.parametrize(("one", "other"), EQUAL, ids=str)
def test_degenerate_case(one, other):
    """Equal to the last bit."""
    problem, shape = softmax.make(seed=6), {"cohorts": PARTIAL}
    first, _ = run.trajectory(create(one[0], **one[1]), problem, **shape)
    second, _ = run.trajectory(create(other[0], **other[1]), problem, **shape)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


NEARLY = [
    (("fedspeed", {"r": 0.0, "lam": 8.0}), ("feddyn", {"a": 0.125})),
    (("fedspeed", {"alpha": 0.0, "lam": 8.0}), ("feddyn", {"a": 0.125})),
    (("fedasam", {"r": 1e-7, "a": 1e6}), ("fedsam", {"r": 0.1})),
]


@pytest.mark.parametrize(("one", "other"), NEARLY, ids=str)
def test_degenerate_case_up_to_rounding(one, other):
    problem, shape = softmax.make(seed=6), {"cohorts": PARTIAL}
    first, _ = run.trajectory(create(one[0], **one[1]), problem, **shape)
    second, _ = run.trajectory(create(other[0], **other[1]), problem, **shape)
    tolerance = 1e-6 if one[0] == "fedasam" else 1e-12  # a is large, not infinite
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def test_first_rounds():
    """FedLESAM begins as FedAvg; FedGAMMA and FedNSAM as FedSAM."""
    problem, shape = softmax.make(seed=7), {"rounds": 1}
    for name, like in (("fedlesam", "fedavg"), ("fedgamma", "fedsam"), ("fednsam", "fedsam")):
        one, _ = run.trajectory(create(name), problem, **shape)
        other, _ = run.trajectory(create(like), problem, **shape)
        np.testing.assert_array_equal(one[0], other[0])


def test_dual_variables_of_everyone_are_those_of_the_cohort_when_all_take_part():
    problem = softmax.make(seed=7)
    one, _ = run.trajectory(create("fedspeed"), problem, rounds=4)
    other, _ = run.trajectory(create("fedspeed", dual_mean="cohort"), problem, rounds=4)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["fedlesam", "fedgamma", "fedspeed"])
def test_clients_that_are_not_sampled_keep_their_state(name):
    problem = softmax.make(seed=8)
    sim = run.simulation(create(name), problem, cohorts=[[0, 1], [1, 2]])
    sim.round()
    before = {key: value.clone() for key, value in sim.client_states[0].items()}
    sim.round()
    assert sorted(sim.client_states) == [0, 1, 2]
    for key, value in before.items():
        assert bool((sim.client_states[0][key] == value).all())
