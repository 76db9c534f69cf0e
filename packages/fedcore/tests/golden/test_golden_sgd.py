"""Trajectories and states of FedAvg and the methods on local SGD against float64 NumPy."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from fedcore.algorithms import create


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_sgd{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


softmax, run, reference = _load("_softmax"), _load("_run"), _load("_sgd_reference")

CASES = [
    ("fedavg", {}),
    ("fedprox", {}),
    ("fedprox", {"mu": 0.7}),
    ("scaffold", {}),
    ("fedcm", {}),
    ("fedcm", {"beta": 0.6}),
    ("fedacg", {}),
    ("fedacg", {"lam": 0.5, "b": 0.4}),
    ("feddyn", {}),
    ("feddyn", {"a": 0.3}),
    ("fedswa", {}),
    ("fedswa", {"rho": 0.0, "alpha": 0.7}),
    ("fedmoswa", {}),
    ("fedmoswa", {"option": "I"}),
    ("fedmoswa", {"divisor": "code", "gamma": 0.1, "first_round_gamma": 1.0}),
    ("fedmoswa", {"rho": 0.0, "alpha": 0.8, "gamma": 1.0}),
    ("server_swa", {}),
    ("server_swa", {"share": 0.6}),
]
PARTIAL = [[0, 3], [1, 2, 4], [3], [0, 1, 4], [2, 3]]
# Options of the algorithm and of the run. The last meets the clip, the cap of steps and unequal weights.
SCENARIOS = {
    "all": ({"lr": 0.2}, {"cohorts": [[0, 1, 2, 3, 4]] * 4}),
    "partial": ({"round_lr": "constant", "weight_decay": 0.05, "clip_grad": 0.0}, {"cohorts": PARTIAL}),
    "clipped": (
        {"round_lr": "cosine", "clip_grad": 0.5, "weight_decay": 0.02},
        {"cohorts": PARTIAL, "max_steps": 5, "weighting": "samples", "loss_scale": 1.5},
    ),
}
SCENARIOS["together"] = (SCENARIOS["clipped"][0], {**SCENARIOS["clipped"][1], "engine": "batched"})
ATOL = 1e-12


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else str(v))
def test_trajectory(name, options, scenario):
    base, shape = SCENARIOS[scenario]
    problem = softmax.make(seed=3)
    keys = {"max_steps": "max_steps", "weighting": "weighting", "loss_scale": "scale"}
    world = reference.World(
        softmax, problem, shape["cohorts"], **base, **{keys[k]: v for k, v in shape.items() if k in keys}
    )
    expected = getattr(reference, name)(world, **options)
    sim = run.simulation(create(name, **base, **options), problem, **shape)
    for theta, shown in zip(expected.thetas, expected.shown, strict=True):
        sim.round()
        np.testing.assert_allclose(sim.flat.numpy(), theta, rtol=0, atol=ATOL)
        np.testing.assert_allclose(sim.evaluation_flat.numpy(), shown, rtol=0, atol=ATOL)
    assert sim.engine == shape.get("engine", "serial")
    same_states({0: sim.server_state}, {0: expected.server})
    same_states(sim.client_states, expected.clients)


def same_states(found, expected):
    assert sorted(found) == sorted(expected)
    for key, tree in expected.items():
        assert sorted(found[key]) == sorted(tree)
        for name, value in tree.items():
            np.testing.assert_allclose(found[key][name].numpy(), value, rtol=0, atol=ATOL)


def test_the_scenarios_reach_what_they_name():
    """The clip changes a round by itself, the cap shortens some clients but not all, and the weights matter."""
    base, shape = SCENARIOS["clipped"]
    problem = softmax.make(seed=3)
    options = {**base, "max_steps": shape["max_steps"], "weighting": "samples", "scale": shape["loss_scale"]}
    ends = [
        reference.fedavg(reference.World(softmax, problem, PARTIAL, **{**options, **other})).thetas[-1]
        for other in ({}, {"clip_grad": 0.0}, {"max_steps": 0}, {"weighting": "uniform"})
    ]
    assert min(np.abs(ends[0] - end).max() for end in ends[1:]) > 1e-3
    assert {len(softmax.batches(problem, i, max_steps=shape["max_steps"])) for i in problem.everyone} == {2, 4, 5}


def test_the_cases_differ():
    """No two cases give the same trajectory in the reference, except where the definitions say so."""
    problem, ends = softmax.make(seed=3), {}
    for name, options in CASES:
        world = reference.World(softmax, problem, PARTIAL, lr=0.2)
        result = getattr(reference, name)(world, **options)
        ends[name, str(options)] = np.concatenate(result.shown)
    keys = list(ends)
    for i, one in enumerate(keys):
        for other in keys[:i]:
            # One late model averaged is FedAvg.
            same = {one[0], other[0]} == {"fedavg", "server_swa"} and "share" not in one[1] + other[1]
            assert (np.abs(ends[one] - ends[other]).max() < 1e-4) == same, (one, other)
