"""Trajectories and states of FedAdamW and its rivals against float64 NumPy."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from fedcore.algorithms import create


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_adamw{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


softmax, run, reference = _load("_softmax"), _load("_run"), _load("_adamw_reference")

CASES = [
    ("local_adamw", {}),
    ("local_adam", {}),
    ("fedadamw", {}),
    *(("fedadamw", {"v_blocks": blocks}) for blocks in ("tensor", "full", "none")),
    ("fedadamw", {"alpha": 0.0}),
    ("fedadamw", {"alpha": 0.9, "mix": True}),
    ("fedadamw", {"bias": "code"}),
    ("fedadamw", {"bias": "code", "v_blocks": "none"}),
    ("fedadamw", {"mix": True, "bias": "code", "v_blocks": "full", "alpha": 0.2}),
    ("agg_v", {}),
    ("agg_m", {}),
    ("agg_m", {"cap": 0.4}),
    ("agg_vm", {}),
    ("fedlada", {}),
    ("fedlada", {"gamma": 0.0}),
    ("fedcm_adamw", {}),
    ("fedcm_adamw", {"beta": 1.0}),
    ("scaffold_adamw", {}),
]
PARTIAL = [[0, 3], [1, 2, 4], [3], [0, 1, 4], [2, 3]]
SHARED = {"lr", "round_lr", "weight_decay", "clip_grad", "no_decay_1d", "b1", "b2", "eps"}
# The last meets the clip (loss scale), the cap of steps, unequal weights and all options that the methods share.
SCENARIOS = {
    "all": {"lr": 0.03, "cohorts": [[0, 1, 2, 3, 4]] * 4},
    "partial": {"lr": 0.02, "round_lr": "constant", "weight_decay": 0.5, "clip_grad": 0.0, "cohorts": PARTIAL},
    "options": {
        "lr": 0.05,
        "round_lr": "exp",
        "weight_decay": 0.3,
        "clip_grad": 0.5,
        "no_decay_1d": True,
        "b1": 0.7,
        "b2": 0.9,
        "eps": 1e-3,
        "cohorts": PARTIAL,
        "max_steps": 5,
        "weighting": "samples",
        "loss_scale": 1.5,
    },
}
ATOL = 1e-12


def both(name, options, scenario, problem):
    """Trajectory, server state and client states of the reference and of the package."""
    scenario = dict(scenario)
    cohorts, scale = scenario.pop("cohorts"), scenario.pop("loss_scale", 1.0)
    world = reference.World(softmax, problem, cohorts, scale=scale, **scenario)
    expected = reference.METHODS[name](world, **options)
    hyper = {key: value for key, value in scenario.items() if key in SHARED}
    shape = {key: value for key, value in scenario.items() if key not in SHARED}
    algorithm = create(name, **hyper, **options)
    found, sim = run.trajectory(algorithm, problem, cohorts=cohorts, loss_scale=scale, **shape)
    return expected, found, sim


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else str(v))
def test_trajectory(name, options, scenario):
    problem = softmax.make(seed=5)
    (expected, server, clients), found, sim = both(name, options, {"weight_decay": 0.01} | SCENARIOS[scenario], problem)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)
    assert np.abs(np.diff(expected, axis=0)).max() > 1e-4
    for key, value in sim.server_state.items():
        value = value.numpy()
        if key == "v" and sim.algorithm.carried and name == "fedadamw" and sim.algorithm.blocks:
            value = value[sim.algorithm.blocks.ids.numpy()]
        np.testing.assert_allclose(value, server[key], rtol=0, atol=1e-9 if key == "direction" else ATOL, err_msg=key)
    assert set(sim.client_states) == set(clients)
    for client, state in clients.items():
        np.testing.assert_allclose(sim.client_states[client]["c"].numpy(), state, rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("variant", "same"),
    [
        ("code2025-07", {"mix": True, "v_blocks": "tensor", "bias": "code"}),
        ("code2025-11", {"v_blocks": "full", "bias": "code"}),
    ],
)
def test_presets_of_the_scripts(variant, same):
    problem = softmax.make(seed=6)
    cohorts = SCENARIOS["partial"]["cohorts"]
    expected, *_ = reference.fedadamw(reference.World(softmax, problem, cohorts, lr=0.02), **same)
    found, _ = run.trajectory(create("fedadamw", lr=0.02, variant=variant), problem, cohorts=cohorts)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)


def test_the_clip_is_met_in_the_scenario_that_is_said_to_meet_it():
    problem = softmax.make(seed=5)
    norms = [np.linalg.norm(1.5 * softmax.full_gradient(problem.start, problem, i)) for i in problem.everyone]
    assert max(norms) > 0.5
