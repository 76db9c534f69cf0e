"""Ledger, budget and resume of private runs: what was released is never forgotten, noise never repeated."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fedcore import Simulation
from fedcore.algorithms import create
from fedcore.privacy import BudgetError, Ledger, epsilon, epsilon_of
from polymodal.errors import UserError


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_resume{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_private = _load("_private")
toy, TEST_SWITCH, private, Puppet = _private.toy, _private.TEST_SWITCH, _private.private, _private.Puppet


# ------------------------------------------------------------------ ledger, budget


def test_the_event_is_on_the_disk_before_the_server_steps(tmp_path):
    path, counts = tmp_path / "ledger.jsonl", []

    @dataclass(frozen=True, kw_only=True)
    class Watching(Puppet):
        def server_step(self, server, params, reduced, ctx):
            counts.append(len(path.read_text().splitlines()) - 1)
            raise OSError("the machine dies")

    sim = private(None, Watching(scripts={}))
    sim.open_ledger(path)
    for _ in range(2):
        with pytest.raises(OSError, match="dies"):
            sim.round()
    assert counts == [1, 2]  # what was drawn twice counts twice
    assert (sim.done, len(Ledger(path))) == (0, 2)


def test_nothing_is_released_where_the_ledger_cannot_be_written(tmp_path):
    sim = private()
    sim.open_ledger(tmp_path / "ledger.jsonl")
    sim.round()
    (tmp_path / "ledger.jsonl").write_text("")
    before = sim.flat.clone()
    with pytest.raises(UserError, match="another process"):
        sim.round()
    assert torch.equal(sim.flat, before)
    assert sim.done == 1


def test_the_budget_stops_before_the_round_that_exceeds_it():
    delta = 0.01
    target = (epsilon(1.0, 4.0, 3, delta) + epsilon(1.0, 4.0, 4, delta)) / 2
    sim = private({"noise_multiplier": 4.0, "target_epsilon": target, "delta": delta}, fraction=1.0, rounds=10)
    rows = []
    with pytest.raises(BudgetError, match="budget") as caught:
        sim.run(10, on_round=rows.append)
    assert len(rows) == sim.done == len(sim.ledger) == 3
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    assert sim.epsilon <= target
    before = sim.flat.clone()
    with pytest.raises(BudgetError):
        sim.round()
    assert torch.equal(sim.flat, before)


def test_a_budget_that_is_spent_already_stops_the_first_round(tmp_path):
    first = private({"noise_multiplier": 4.0}, fraction=1.0)
    first.open_ledger(tmp_path / "ledger.jsonl")
    first.run(2)
    sim = private({"noise_multiplier": 4.0, "target_epsilon": first.epsilon * 1.01}, fraction=1.0, rounds=5)
    sim.open_ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(BudgetError):
        sim.round()


def test_sigma_is_chosen_for_a_target_over_all_rounds():
    sim = private({"noise_multiplier": None, "target_epsilon": 2.0, "delta": 0.01}, fraction=1.0, rounds=3)
    sim.run(3)
    assert 1.9 < sim.epsilon <= 2.0
    with pytest.raises(BudgetError):
        sim.round()
    unknown = private({"noise_multiplier": None, "target_epsilon": 2.0})
    with pytest.raises(UserError, match="number of rounds"):
        unknown.round()


# ------------------------------------------------------------------ resume


def test_resume_continues_the_ledger_and_never_repeats_noise():
    sim = private({"noise_multiplier": 0.7})
    sim.run(2)
    saved = sim.state_dict()
    assert "noise" not in json.dumps(
        {k: str(v) for k, v in saved["privacy"].items() if k != "noise_multiplier"}
    ).replace("noise_multiplier", "")
    sim.round()
    resumed = private({"noise_multiplier": 1.4})
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.flat, torch.as_tensor(saved["flat"]))
    resumed.round()
    assert not torch.equal(resumed.flat, sim.flat)
    assert [event.noise_multiplier for event in resumed.ledger.events] == [0.7, 0.7, 1.4]
    assert resumed.epsilon == epsilon_of(resumed.ledger.events, 0.01) < sim.epsilon
    assert resumed.report().noise_multipliers == (0.7, 1.4)


def test_going_back_forgets_no_release(tmp_path):
    sim = private()
    sim.open_ledger(tmp_path / "ledger.jsonl")
    sim.run(2)
    saved = sim.state_dict()
    sim.run(3)
    spent = sim.epsilon
    sim.load_state_dict(saved)
    assert (sim.done, len(sim.ledger), sim.epsilon) == (2, 5, spent)
    # A new process: the file knows more than the checkpoint.
    fresh = private()
    fresh.open_ledger(tmp_path / "ledger.jsonl")
    fresh.load_state_dict(saved)
    fresh.round()
    assert [event.round for event in fresh.ledger.events] == [0, 1, 2, 3, 4, 2]
    assert Ledger(tmp_path / "ledger.jsonl").events == fresh.ledger.events
    # The file is lost: the checkpoint knows.
    other = private()
    other.load_state_dict(saved)
    other.open_ledger(tmp_path / "other.jsonl")
    assert len(Ledger(tmp_path / "other.jsonl")) == 2


@pytest.mark.parametrize("algorithm", ["dp_fedpgn", "dp_scaffold"])
def test_resume_is_bit_exact_under_the_test_switch_alone(algorithm):
    whole = private(TEST_SWITCH, create(algorithm))
    whole.run(4)
    first = private(TEST_SWITCH, create(algorithm))
    first.run(2)
    second = private(TEST_SWITCH, create(algorithm))
    second.load_state_dict(first.state_dict())
    second.run(2)
    assert torch.equal(second.flat, whole.flat)
    assert second.epsilon == math.inf


def test_states_do_not_pass_between_private_and_plain_runs():
    plain = Simulation(toy.mlp(), toy.clients((8,) * 10), create("fedavg"), batch_size=4, engine="serial")
    plain.round()
    sim = private(algorithm=create("fedavg"))
    sim.load_state_dict(plain.state_dict())
    assert sim.epsilon == math.inf
    assert "without privacy" in sim.report().reasons[0]
    with pytest.raises(UserError, match="private run"):
        plain.load_state_dict(sim.state_dict())


def test_damaged_and_newer_ledgers_stop_the_resume():
    sim = private()
    sim.round()
    state = sim.state_dict()
    state["privacy"]["ledger"]["schema_version"] = 9
    fresh = private()
    with pytest.raises(UserError, match="schema version"):
        fresh.load_state_dict(state)
    assert fresh.done == 0


@pytest.mark.parametrize("algorithm", ["dp_fedavg", "dp_scaffold"])
def test_engines_give_the_same_bits_under_the_test_switch(algorithm):
    serial = private(TEST_SWITCH, create(algorithm))
    serial.run(3)
    with private(TEST_SWITCH, create(algorithm), engine="pool", workers=2) as pool:
        pool.run(3)
    assert torch.equal(serial.flat, pool.flat)
    for client in serial.client_states:
        for name, value in serial.client_states[client].items():
            assert torch.equal(value, pool.client_states[client][name])
