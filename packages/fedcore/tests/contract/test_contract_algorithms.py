"""What every registered algorithm promises, whatever it computes: order, isolation, purity, resume, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from fedcore import Simulation
from fedcore.algorithms import ALGORITHMS, create
from fedcore.lora import inject
from fedcore.privacy import PrivacyConfig, PrivateSimulation
from polymodal.errors import UserError
from polymodal.nested import difference
from torch import nn
from torch.utils.data import TensorDataset

NAMES = ALGORITHMS.names()
COHORTS = [[0, 1], [1, 3], [0, 2], [1, 2, 3], [0, 3]]
RANKS = [1, 3, 2, 3]
"""of the clients' adapters, for methods that train these"""
PRIVACY = PrivacyConfig(clip=0.5, noise_multiplier=0.3, deterministic_noise_for_tests=True, unsafe_debug_metrics=True)
"""of private methods: noise that repeats, rows that tell what is not private"""


def clients(seed=0, sizes=(7, 12, 5, 9)):
    draw = torch.Generator().manual_seed(seed)
    data = []
    for size in sizes:
        x = torch.randn(size, 6, generator=draw)
        data.append(TensorDataset(x, torch.randint(3, (size,), generator=draw)))
    return data


def network(rank=0):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3))
    return inject(net, rank) if rank else net


def is_lora(name):
    return "lora" in ALGORITHMS.info(name).tags


def simulate(name, cohorts=COHORTS, data=None, **options):
    options = {"batch_size": 4, "local_epochs": 2, "rounds": len(COHORTS), "engine": "serial", **options}
    algorithm, model = create(name, lr=0.05), network()
    if is_lora(name):
        model, options["ranks"] = network, [2] * len(RANKS) if algorithm.equal_ranks else RANKS
    if algorithm.private:
        options = {"max_steps": 4, "exact_steps": True, "privacy": PRIVACY, **options}
        return PrivateSimulation(model, data or clients(), algorithm, cohorts=cohorts, **options)
    return Simulation(model, data or clients(), algorithm, cohorts=cohorts, **options)


def state_of(sim):
    return {"flat": sim.flat, "server": sim.server_state, "clients": {i: dict(s) for i, s in sim.client_states.items()}}


def after(sim, rounds):
    for _ in range(rounds):
        sim.round()
    return state_of(sim)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits_and_training_moves(name):
    first, second = simulate(name), simulate(name)
    start = first.flat.clone()
    assert not difference(after(first, 3), after(second, 3))
    assert not torch.equal(first.flat, start)
    assert bool(first.flat.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_order_in_which_a_cohort_is_named_does_not_matter(name):
    mixed = [list(reversed(cohort)) for cohort in COHORTS]
    assert not difference(after(simulate(name), 4), after(simulate(name, mixed), 4))


@pytest.mark.parametrize("name", NAMES)
def test_clients_that_are_not_sampled_stay_untouched(name):
    sim = simulate(name)
    for cohort in COHORTS:
        before = copy.deepcopy({i: dict(s) for i, s in sim.client_states.items()})
        sim.round()
        kept = {i: dict(s) for i, s in sim.client_states.items()}
        others = set(before) - set(cohort)
        assert not difference({i: before[i] for i in others}, {i: kept[i] for i in others})
        if ALGORITHMS.load(name).keeps_state:
            assert set(kept) == set(before) | set(cohort)
        else:
            assert not kept


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_exact(name):
    whole = after(simulate(name), len(COHORTS))
    first = simulate(name)
    after(first, 2)
    saved = copy.deepcopy(first.state_dict())
    after(first, 1)  # what was saved does not hang on the simulation
    second = simulate(name)
    second.load_state_dict(saved)
    assert not difference(whole, after(second, len(COHORTS) - 2))


@pytest.mark.parametrize("name", NAMES)
def test_server_step_and_broadcast_leave_their_arguments(name):
    sim = simulate(name)
    for _ in COHORTS:
        flat, server = sim.flat, dict(sim.server_state)
        kept = copy.deepcopy({"flat": flat, "server": server})
        sim.round()
        assert not difference(kept, {"flat": flat, "server": server})


@pytest.mark.parametrize("name", NAMES)
def test_a_failing_client_is_left_out_and_its_state_kept(name):
    class Broken:
        broken = False

        def __init__(self, dataset):
            self.dataset = dataset

        def __len__(self):
            return len(self.dataset)

        def batch(self, indices, generator):
            if self.broken:
                raise OSError("disk gone")
            return self.dataset[indices]

    data = clients()
    data[1] = Broken(data[1])
    sim = simulate(name, [[0, 1], [0, 1, 2]], data)
    sim.round()
    kept = copy.deepcopy(dict(sim.client_states.get(1, {})))
    data[1].broken = True
    alone = simulate(name, [[0, 1], [0, 2]])
    alone.load_state_dict(copy.deepcopy(sim.state_dict()))
    assert sim.round()["clients"] == 2
    assert not difference(kept, dict(sim.client_states.get(1, {})))
    assert bool(sim.flat.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_one_step_of_one_sample_works(name):
    sim = simulate(name, [[0], [0]], clients(sizes=(1, 3, 2, 2)), max_steps=1)
    assert bool(after(sim, 2)["flat"].isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_tensors_sent(name):
    sim = simulate(name)
    row = sim.round()
    size = sim.flat.numel() * 4
    least = 1 if is_lora(name) else 2 * size  # smaller ranks are sent less, and factors that stand still are not sent
    assert row["comm/down_bytes"] >= least
    assert row["comm/up_bytes"] >= (0.4 * least if name == "fed_smp" else least)
    assert row["comm/up_bytes"] <= 2 * 3 * size


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": -1.0}, {"lr": float("nan")}, {"weight_decay": -1.0}])
def test_bad_options_are_named(name, options):
    with pytest.raises(UserError, match=next(iter(options))):
        create(name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_states_of_other_shapes_are_refused(name):
    sim = simulate(name)
    saved = sim.state_dict()
    saved["flat"] = saved["flat"][:-1]
    with pytest.raises(UserError, match="parameters"):
        sim.load_state_dict(saved)
