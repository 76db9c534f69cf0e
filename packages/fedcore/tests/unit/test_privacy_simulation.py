"""Rounds under privacy: what they release, what they refuse, what nobody is told."""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fedcore import RoundError, Simulation, federate
from fedcore.algorithms import create
from fedcore.privacy import PrivacyConfig, PrivateSimulation, epsilon, epsilon_of
from polymodal.errors import UserError
from torch import nn
from torch.utils.data import TensorDataset


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_privacy{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_private = _load("_private")
toy, TEST_SWITCH, private, Puppet, puppets, moved = (
    _private.toy,
    _private.TEST_SWITCH,
    _private.private,
    _private.Puppet,
    _private.puppets,
    _private.moved,
)


# ------------------------------------------------------------------ what a round releases


@pytest.mark.parametrize("adversary", [1e30, -1e300, 1e308, math.nan, math.inf, "raise", "short", 0.0])
def test_one_client_more_or_less_moves_the_sum_by_at_most_c(adversary):
    scripts = {0: 0.3, 1: -5.0, 2: adversary, 3: 1e-3, 4: 7.0}
    clip, m = 0.7, 3.0  # the denominator is the largest cohort, here that of both
    with_it = puppets(scripts, [[1, 2, 3], [0]], clip)
    without = puppets(scripts, [[1, 3], [0, 1, 2]], clip)
    assert with_it.denominator == without.denominator == m
    difference = m * (moved(with_it) - moved(without))
    assert float(difference.norm()) <= clip * (1 + 1e-9)


def test_an_empty_cohort_releases_pure_noise_and_is_accounted():
    sim = private({"clip": 0.5, "noise_multiplier": 2.0}, fraction=1e-9)
    assert sim.cohort() == []
    change = moved(sim)
    m = 1e-9 * 10
    assert float(change.std()) == pytest.approx(2.0 * 0.5 / m, rel=0.5)
    assert bool(change.all())
    assert len(sim.ledger) == 1


def test_a_round_where_everybody_fails_is_pure_noise_too():
    sim = private(None, Puppet(scripts=dict.fromkeys(range(10), "raise")), fraction=1.0)
    assert bool(moved(sim).all())
    assert len(sim.ledger) == 1


def test_noise_in_the_parameters_is_as_large_as_sigma_c_over_m():
    big = nn.Linear(1000, 100)  # zero updates: what is left is noise
    data = [TensorDataset(torch.randn(2, 1000), torch.randint(100, (2,))) for _ in range(4)]
    sim = private({"clip": 0.3, "noise_multiplier": 0.8}, Puppet(scripts={}), model=big, data=data, fraction=0.5)
    first, second = moved(sim).double(), moved(sim).double()
    for change in (first, second):
        assert float(change.std()) == pytest.approx(0.8 * 0.3 / 2.0, rel=0.01)
        assert abs(float(change.mean())) < 4 * 0.12 / math.sqrt(len(change))
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / math.sqrt(len(first))


def test_two_runs_with_the_same_seed_have_noise_and_cohorts_of_their_own():
    one, two = private(), private()
    assert not torch.equal(moved(one), moved(two))
    drawn = [[tuple(private(seed=1).cohort()) for _ in range(12)] for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_secret_cohorts_stay_until_the_round_is_over():
    sim = private(fraction=0.3)
    first = sim.cohort()
    assert sim.cohort() == first
    seen = set()
    for _ in range(20):
        seen.add(tuple(sim.cohort()))
        sim.round()
    assert len(seen) > 5


def test_clients_and_server_see_public_numbers_alone():
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Nosy(Puppet):
        def broadcast(self, server, params, ctx, client):
            seen.append(ctx)
            return params, {}

        def local_init(self, params, message, state, ctx, full_grad):
            seen.append(ctx)
            return super().local_init(params, message, state, ctx, full_grad)

        def server_step(self, server, params, reduced, ctx):
            seen.append(ctx)
            return params + reduced["delta"], server

    sim = private(None, Nosy(scripts={1: "raise"}), fraction=0.45)
    for _ in range(4):
        sim.round()
    assert {(ctx.cohort, ctx.steps, ctx.max_steps, ctx.num_clients) for ctx in seen} == {(4.5, 2, 2, 10)}


def test_plain_methods_run_through_the_mechanism_as_well():
    sim = federate(
        toy.mlp(),
        toy.clients((8,) * 6),
        "fedavg",
        privacy=PrivacyConfig(clip=0.1, noise_multiplier=0.5),
        batch_size=4,
        fraction=0.5,
        engine="serial",
    )
    assert isinstance(sim, PrivateSimulation)
    sim.run(2)
    assert sim.epsilon == pytest.approx(epsilon(0.5, 0.5, 2, 1 / 60), rel=1e-9)


def test_without_noise_and_bound_it_is_the_plain_method():
    cohorts = [[0, 2, 4], [1, 3, 5], [0, 1, 2]]
    data = toy.clients((8,) * 6, dtype=torch.float64)
    options = {"batch_size": 4, "cohorts": cohorts, "engine": "serial"}
    open_ = PrivacyConfig(clip=math.inf, noise_multiplier=0.0)
    ours = federate(toy.mlp().double(), data, "dp_fedavg", privacy=open_, **options)
    plain = federate(toy.mlp().double(), data, "fedavg", **options)
    for _ in range(3):
        ours.round()
        plain.round()
    torch.testing.assert_close(ours.flat, plain.flat, rtol=1e-12, atol=1e-14)
    assert ours.epsilon == math.inf


# ------------------------------------------------------------------ nothing else gets out


def test_rows_and_logs_say_nothing_of_clients(caplog):
    with caplog.at_level(logging.DEBUG):
        sim = private(None, Puppet(scripts={3: "raise", 4: math.nan}), fraction=1.0)
        row = sim.round()
    assert set(row) == {"round", "lr"}
    assert "client" not in caplog.text
    assert "patient" not in caplog.text


@pytest.mark.parametrize("engine", ["pool", "batched"])
def test_engines_say_nothing_of_clients_either(caplog, capfd, engine):
    scripts = {3: "raise", 4: math.nan}
    with (
        caplog.at_level(logging.DEBUG),
        private(None, Puppet(scripts=scripts), fraction=1.0, engine=engine, workers=2) as sim,
    ):
        sim.round()
    assert "patient" not in caplog.text + "".join(capfd.readouterr())
    assert logging.getLogger("fedcore.engines").level == logging.NOTSET


def test_what_is_not_private_comes_with_its_switch_and_no_epsilon(caplog):
    with caplog.at_level(logging.WARNING):
        sim = private({"unsafe_debug_metrics": True}, Puppet(scripts={3: "raise", 4: 9.0}), fraction=1.0)
        row = sim.round()
    assert row["clients"] == 9
    assert row["unsafe/clipped"] == pytest.approx(1 / 9)
    assert "seconds" in row
    assert "unsafe_debug_metrics" in caplog.text
    assert "patient" in caplog.text
    assert sim.epsilon == math.inf
    assert sim.report().unsafe_metrics


def test_buffers_are_never_averaged():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = toy.mlp()
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, x):
            return self.net(x) * self.scale

    sim = private(model=Scaled())
    sim.round()
    assert float(sim.buffers["scale"]) == 2.0


# ------------------------------------------------------------------ what is refused


class Moving(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = toy.mlp()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(dim=0), alpha=0.1)
        return self.net(x - self.mean)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"model": toy.Normed()}, "GroupNorm"),
        ({"model": nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False))}, "GroupNorm"),
        ({"model": Moving()}, "buffer mean"),
        ({"weighting": "samples"}, "weighting=uniform"),
        ({"data": toy.clients((8, 12, 5))}, "max_steps=3 with exact_steps"),
        ({"algorithm": type("Listing", (Puppet,), {"reduction": "list"})(scripts={})}, "sum alone"),
        ({"ranks": [2] * 5 + [4] * 5}, "one rank"),
        ({"privacy": {"clip": None}}, "privacy.clip"),
        ({"privacy": {"clip": math.inf}}, "infinite"),
        ({"privacy": {"noise_multiplier": None}}, "target_epsilon"),
        ({"privacy": {"noise_location": "client"}}, "sampling=fixed"),
        ({"privacy": {"secure_noise": True, **TEST_SWITCH}}, "exclude"),
        ({"privacy": {"target_epsilon": 1.0, "unsafe_debug_metrics": True}}, "cannot be kept"),
    ],
)
def test_what_no_guarantee_can_be_given_for_is_refused_in_one_line(options, word):
    with pytest.raises(UserError, match=word) as caught:
        private(**options)
    assert "\n" not in str(caught.value)


def test_the_remedy_for_unequal_steps_works():
    sim = private(data=toy.clients((8, 12, 5, 0, 3)), max_steps=3, exact_steps=True, fraction=1.0)
    sim.round()
    assert sim.public_steps == 3
    assert sim.epsilon < math.inf


def test_private_methods_do_not_run_without_a_mechanism():
    with pytest.raises(UserError, match="PrivacyConfig"):
        Simulation(toy.mlp(), toy.clients(), create("dp_fedavg"))


def test_a_missing_library_is_one_line_before_anything_is_trained(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match="dp-accounting"):
        private()


# ------------------------------------------------------------------ epsilon = inf


@pytest.mark.parametrize(
    ("privacy", "options", "word"),
    [
        ({"clip_mode": "official_median", "clip": None}, {}, "official_median"),
        ({"noise_multiplier": 0.0}, {}, "no noise"),
        ({"unsafe_debug_metrics": True}, {}, "unsafe"),
        (TEST_SWITCH, {}, "deterministic"),
        ({}, {"cohorts": [[0, 1, 2]]}, "cohorts are given"),
    ],
)
def test_a_precondition_that_fails_makes_epsilon_infinite(privacy, options, word):
    sim = private(privacy, **options)
    assert sim.epsilon == math.inf
    sim.round()
    assert sim.epsilon == sim.epsilon_now() == math.inf
    report = sim.report()
    assert report.epsilon == report.epsilon_rdp == math.inf
    assert any(word in reason for reason in report.reasons)
    assert epsilon_of(sim.ledger.events, 0.01) == math.inf


def test_given_cohorts_of_fixed_sampling_keep_the_replace_one_guarantee():
    sim = private({"sampling": "fixed", "noise_multiplier": 4.0}, cohorts=[[0, 1, 2], [3, 4, 5]])
    sim.run(2)
    assert sim.epsilon == pytest.approx(epsilon(0.3, 4.0, 2, 0.01, sampling="fixed"))
    assert sim.report().adjacency == "replace one client"


def test_a_fixed_cohort_has_one_size_and_its_own_accounting():
    sim = private({"sampling": "fixed", "noise_multiplier": 4.0}, fraction=0.3)
    assert len(sim.cohort()) == 3
    sim.round()
    assert sim.epsilon > epsilon(0.3, 4.0, 1, sim.delta)
    assert sim.epsilon == epsilon(0.3, 4.0, 1, sim.delta, sampling="fixed")


def test_clients_that_add_noise_themselves_must_all_be_there():
    settings = {"sampling": "fixed", "noise_location": "client"}
    sim = private(settings, Puppet(scripts={}), fraction=0.5)
    assert bool(moved(sim).all())
    sim = private(settings, Puppet(scripts={3: "raise"}), fraction=1.0)
    before = sim.flat.clone()
    with pytest.raises(RoundError, match="missing"):
        sim.round()
    assert torch.equal(sim.flat, before)
    assert len(sim.ledger) == 0
