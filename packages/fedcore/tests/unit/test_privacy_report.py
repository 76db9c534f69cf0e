"""What stands beside every result."""

from __future__ import annotations

import json
import math

import pytest
import torch
from fedcore import federate
from fedcore.privacy import PrivacyConfig, epsilon
from torch import nn
from torch.utils.data import TensorDataset


def simulation(clients=20, **privacy):
    data = [TensorDataset(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(clients)]
    settings = PrivacyConfig(**{"clip": 0.2, "noise_multiplier": 2.0, **privacy})
    return federate(nn.Linear(3, 2), data, "dp_fedavg", privacy=settings, fraction=0.25, engine="serial", batch_size=2)


def test_a_report_says_what_was_executed():
    sim = simulation()
    sim.run(3)
    report = sim.report()
    assert report.epsilon == epsilon(0.25, 2.0, 3, 1 / 200)
    assert report.epsilon_rdp == epsilon(0.25, 2.0, 3, 1 / 200, "rdp") > report.epsilon
    assert sim.epsilon_now() == pytest.approx(report.epsilon, rel=0.01)
    assert sim.epsilon_now() >= report.epsilon * (1 - 1e-9)
    assert (report.releases, report.clients, report.sampling_rate, report.expected_cohort) == (3, 20, 0.25, 5.0)
    assert (report.noise_multiplier, report.clip, report.delta) == (2.0, 0.2, 1 / 200)
    assert report.library.startswith("dp-accounting ")
    assert report.adjacency == "add or remove one client"
    assert report.reasons == ()


def test_a_report_is_text_and_json():
    sim = simulation()
    sim.round()
    text = sim.report().text()
    for part in (
        "epsilon = ",
        "delta = 0.005",
        "dp-accounting",
        "add or remove",
        "sigma 2",
        "C 0.2",
        "hyper-parameters",
    ):
        assert part in text
    found = json.loads(json.dumps(sim.report().to_dict(), allow_nan=False))
    assert found["epsilon"] == sim.report().epsilon
    assert {"unit", "adjacency", "library", "random", "unaccounted", "schema_version", "noise_multipliers"} <= set(
        found
    )


def test_infinity_is_said_loudly_and_in_plain_json():
    sim = simulation(unsafe_debug_metrics=True)
    sim.round()
    text = sim.report().text()
    assert "epsilon = inf" in text
    assert "NO PRIVACY  unsafe_debug_metrics" in text
    assert "UNSAFE" in text
    found = json.loads(json.dumps(sim.report().to_dict(), allow_nan=False))
    assert found["epsilon"] == "inf"
    assert found["unsafe_metrics"] is True


def test_nothing_released_costs_nothing():
    report = simulation().report()
    assert (report.epsilon, report.releases) == (0.0, 0)


def test_weak_guarantees_are_warned_of():
    sim = simulation(delta=0.05, noise_multiplier=0.3)
    sim.round()
    report = sim.report()
    assert any("delta 0.05 is not below 1 / 20" in text for text in report.warnings)
    sim.run(5)
    assert 10 < sim.report().epsilon < math.inf
    assert any("weak" in text for text in sim.report().warnings)
    assert not any("delta" in text for text in simulation(delta=0.049).report().warnings)
