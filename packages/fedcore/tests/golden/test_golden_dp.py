"""Private methods with injected noise against float64 NumPy, through ``PrivateSimulation`` and its mechanism."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fedcore.algorithms import create
from fedcore.ops.laplacian import smooth
from fedcore.privacy import PrivacyConfig, PrivateSimulation
from torch import nn


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_dp{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


softmax, run, reference = _load("_softmax"), _load("_run"), _load("_dp_reference")

CASES = [
    ("dp_fedavg", {}),
    ("dp_fedavg", {"server_momentum": 0.8}),
    ("dp_fedavg", {"smoothing": 0.7}),
    ("dp_fedavg", {"server_momentum": 0.5, "smoothing": 2.0}),
    ("dp_fedpgn", {}),
    ("dp_fedpgn", {"gamma": 0.5, "r": 0.1}),
    ("dp_fedpgn", {"gamma": 0.7, "smoothing": 1.0}),
    ("dp_fedsam", {}),
    ("dp_fedsam", {"r": 0.3, "topk": 0.4}),
    ("dp_blur", {}),
    ("dp_blur", {"a": 3.0, "radius": 0.05, "topk": 0.5}),
    ("fed_smp", {}),
    ("fed_smp", {"p": 0.6, "scale": True}),
    ("dp_scaffold", {}),
    ("dp_scaffold", {"k": 0.3}),
    ("dp_fedcm", {}),
    ("dp_fedcm", {"beta": 0.6}),
    ("dp_mofedsam", {}),
]
COHORTS = [[0, 3], [1, 2, 4], [], [0, 1, 2, 3, 4], [2]]
RATE, STEPS = 0.5, 5
# The first clips most uploads, the second none of them.
SCENARIOS = {"clipped": (0.12, 0.8), "loose": (5.0, 0.02), "silent": (0.2, 0.0)}
ATOL = 1e-12


class Injected:
    """Noise that the test knows, and cohorts that it has chosen: the seams of ``NoiseSource``."""

    mode = "deterministic"

    def __init__(self, noise, cohorts):
        self.noise, self.cohorts = noise, cohorts

    def add(self, totals, deviation, round, purpose="noise"):
        at = 0
        for total in totals:
            flat = total.view(-1)
            flat.add_(torch.from_numpy(self.noise[round][at : at + len(flat)]), alpha=deviation)
            at += len(flat)

    def poisson(self, num_clients, probability, round):
        return self.cohorts[round]


def private(algorithm, problem, noise, clip, sigma, engine="serial"):
    sim = PrivateSimulation(
        run.model(problem),
        run.datasets(problem),
        algorithm,
        privacy=PrivacyConfig(clip=clip, noise_multiplier=sigma),
        loss=nn.functional.cross_entropy,
        batch_size=softmax.BATCH,
        max_steps=STEPS,
        exact_steps=True,
        fraction=RATE,
        shuffle=False,
        rounds=len(COHORTS),
        engine=engine,
    )
    sim.noise = Injected(noise, COHORTS)
    return sim


def world(problem, noise, clip, sigma):
    return reference.World(softmax, problem, COHORTS, noise, clip=clip, sigma=sigma, rate=RATE, steps=STEPS)


def setup(seed=3):
    problem = softmax.make(seed=seed)
    return problem, np.random.default_rng(7).normal(size=(len(COHORTS), 2 * len(problem.start)))


def expected_of(name, algorithm, options, place):
    extra = {}
    if name == "fed_smp":
        size = len(place.problem.start)
        cpu = torch.device("cpu")
        extra["masks"] = [algorithm.coordinates(t, size, cpu).numpy() for t in range(len(COHORTS))]
    return getattr(reference, name)(place, **extra, **options)


@pytest.mark.parametrize(("scenario", "engine"), [*((name, "serial") for name in SCENARIOS), ("clipped", "batched")])
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else str(v))
def test_trajectory(name, options, scenario, engine):
    problem, noise = setup()
    clip, sigma = SCENARIOS[scenario]
    algorithm = create(name, **options)
    expected = expected_of(name, algorithm, options, world(problem, noise, clip, sigma))
    sim = private(algorithm, problem, noise, clip, sigma, engine)
    for theta in expected.thetas:
        sim.round()
        np.testing.assert_allclose(sim.flat.numpy(), theta, rtol=0, atol=ATOL)
    assert sim.engine == engine
    same_states({0: sim.server_state}, {0: expected.server})
    same_states(sim.client_states, expected.clients)


def same_states(found, expected):
    assert sorted(found) == sorted(expected)
    for key, tree in expected.items():
        assert sorted(found[key]) == sorted(tree)
        for name, value in tree.items():
            np.testing.assert_allclose(found[key][name].numpy(), value, rtol=0, atol=ATOL)


def test_the_scenarios_reach_what_they_name():
    """Clip and noise change a round, and no two cases give the same trajectory."""
    problem, noise = setup()
    ends = {}
    for name, options in CASES:
        algorithm = create(name, **options)
        for scenario, (clip, sigma) in SCENARIOS.items():
            place = world(problem, noise, clip, sigma)
            ends[name, str(options), scenario] = expected_of(name, algorithm, options, place).thetas[-1]
    for name, options in CASES:
        found = [ends[name, str(options), scenario] for scenario in SCENARIOS]
        assert min(np.abs(found[i] - found[i - 1]).max() for i in range(3)) > 1e-3
    clipped = [value for (_, _, scenario), value in ends.items() if scenario == "clipped"]
    for i, one in enumerate(clipped):
        for other in clipped[:i]:
            assert np.abs(one - other).max() > 1e-6


def test_smoothing_has_the_known_values():
    found = smooth(torch.tensor([1.0, -2.0, 3.0, 0.5, -1.0], dtype=torch.float64), 1.0)
    known = torch.tensor([5 / 22, -5 / 22, 12 / 11, 0.5, -1 / 11], dtype=torch.float64)
    torch.testing.assert_close(found, known, rtol=0, atol=1e-12)
    assert [f"{value:.7f}" for value in found.tolist()] == [
        "0.2272727", "-0.2272727", "1.0909091", "0.5000000", "-0.0909091",
    ]  # fmt: skip


def test_an_empty_round_releases_pure_noise():
    """Specification 8: step = sigma C z / m + b."""
    problem, noise = setup()
    clip, sigma = SCENARIOS["clipped"]
    sim = private(create("dp_fedpgn"), problem, noise, clip, sigma)
    sim.round()
    sim.round()
    before, c = sim.flat.clone(), sim.server_state["c"].clone()
    rate = sim.algorithm.rate(2, len(COHORTS))
    sim.round()
    size, m = len(problem.start), RATE * problem.clients
    step = sigma * clip * torch.from_numpy(noise[2][:size]) / m + 0.8 * STEPS * rate * c
    torch.testing.assert_close(before - sim.flat, step, rtol=0, atol=1e-12)
    assert math.isclose(m, 2.5)
