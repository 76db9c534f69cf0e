"""The simulation as its users drive it: buffers, frozen and tied tensors, weights, failures, saving."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from fedcore import RoundError, Simulation
from fedcore.algorithms import create
from polymodal.errors import UserError
from torch import nn
from torch.utils.data import Subset, TensorDataset


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_sim{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = _load("_toy")


def simulate(model=None, data=None, algorithm=None, **options):
    options = {"batch_size": 4, "engine": "serial", "cohorts": [[0, 1, 2]] * 5, **options}
    return Simulation(model or toy.mlp(), data or toy.clients(), algorithm or create("fedavg"), **options)


# ------------------------------------------------------------------ models


def test_buffers_are_averaged_and_counters_take_the_largest():
    data = toy.clients((7, 12, 6))
    sim = simulate(toy.Normed(), data, local_epochs=2)
    sim.round()
    alone = []
    for client in range(3):
        one = simulate(toy.Normed(), data, local_epochs=2, cohorts=[[client]])
        one.round()
        alone.append(one.buffers)
    mean = torch.stack([b["norm.running_mean"] for b in alone]).mean(dim=0)
    torch.testing.assert_close(sim.buffers["norm.running_mean"], mean)
    assert int(sim.buffers["norm.num_batches_tracked"]) == max(int(b["norm.num_batches_tracked"]) for b in alone) == 6
    assert bool((sim.buffers["norm.running_var"] > 0).all())


def test_extrapolation_never_reaches_buffers():
    sim = simulate(toy.Normed(), toy.clients((7, 12, 6)), create("fedswa", alpha=1.9), cohorts=[[0, 1, 2]] * 20)
    sim.run(20)
    assert bool((sim.buffers["norm.running_var"] > 0).all())


def test_frozen_and_tied_parameters():
    model = toy.Normed()
    frozen, first = model.frozen.weight.detach().clone(), model.first.weight.detach().clone()
    sim = simulate(model)
    assert "frozen.weight" not in sim.params
    assert "again.weight" not in sim.params
    sim.run(2)
    trained = sim.model
    assert torch.equal(trained.frozen.weight, frozen)
    assert trained.again.weight is trained.first.weight
    assert not torch.equal(trained.first.weight, first)


def test_a_parameter_without_gradient_stays_without_decay():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = toy.mlp(), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    sim = simulate(Unused(), algorithm=create("fedavg", weight_decay=0.0))
    before = sim.params["unused.weight"].clone()
    sim.run(2)
    assert torch.equal(sim.params["unused.weight"], before)


def test_no_trainable_parameter_is_an_error():
    with pytest.raises(UserError, match="no trainable"):
        simulate(toy.mlp().requires_grad_(False))


def test_the_users_model_is_its_own_after_export():
    sim = simulate()
    sim.run(1)
    exported = {k: v.detach().clone() for k, v in sim.model.state_dict().items()}
    model = sim.model
    sim.run(1)
    assert all(torch.equal(sim.params[k], v) for k, v in sim.model.named_parameters())
    assert set(exported) == set(model.state_dict())


# ------------------------------------------------------------------ weights, failures


def test_weights_by_samples():
    by_samples, alone = simulate(weighting="samples"), []
    by_samples.round()
    for client in range(3):
        one = simulate(cohorts=[[client]])
        one.round()
        alone.append(one.flat)
    sizes = torch.tensor([7.0, 12.0, 5.0])
    expected = (torch.stack(alone) * (sizes / sizes.sum())[:, None]).sum(dim=0)
    torch.testing.assert_close(by_samples.flat, expected, rtol=1e-5, atol=1e-6)


class Poisoned:
    """A dataset of a client that goes wrong."""

    def __init__(self, dataset, how):
        self.dataset, self.how, self.armed = dataset, how, False

    def __len__(self):
        return len(self.dataset)

    def batch(self, indices, generator):
        x, y = self.dataset[indices]
        if self.armed and self.how == "raises":
            raise OSError("disk gone")
        return (x * float("nan") if self.armed else x), y


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_a_bad_client_is_dropped_and_the_weights_renormalised(how, caplog):
    data = toy.clients()
    data[1] = Poisoned(data[1], how)
    sim = simulate(data=data)
    data[1].armed = True
    with caplog.at_level(logging.WARNING, "fedcore"):
        row = sim.round()
    assert row["clients"] == 2
    assert "client 1 dropped" in caplog.text
    without = simulate(cohorts=[[0, 2]])
    without.round()
    assert torch.equal(sim.flat, without.flat)


def test_a_round_without_any_client_changes_nothing():
    data = [Poisoned(d, "nan") for d in toy.clients()]
    sim = simulate(data=data, algorithm=create("scaffold"))
    sim.round()
    before, kept = sim.flat.clone(), {i: {k: v.clone() for k, v in s.items()} for i, s in sim.client_states.items()}
    for dataset in data:
        dataset.armed = True
    with pytest.raises(RoundError, match="all 3 clients failed; first: delta is not finite"):
        sim.round()
    assert sim.done == 1
    assert torch.equal(sim.flat, before)
    assert all(torch.equal(v, sim.client_states[i][k]) for i, s in kept.items() for k, v in s.items())


def test_a_client_without_data_is_dropped():
    data = toy.clients()
    data[1] = TensorDataset(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))
    assert simulate(data=data).round()["clients"] == 2


# ------------------------------------------------------------------ input that cannot be used


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cohorts": [[0, 9]]}, "distinct ids of 0..3"),
        ({"cohorts": [[1, 1]]}, "distinct"),
        ({"cohorts": [[]]}, "round 0 is empty"),
        ({"cohorts": None, "fraction": 0.0}, "fraction"),
        ({"engine": "turbo"}, "engine"),
        ({"weighting": "size"}, "weighting"),
        ({"batch_size": 0}, "batch_size"),
        ({"local_epochs": 0}, "local_epochs"),
        ({"max_steps": -1}, "max_steps"),
        ({"data": [[1, 2]] * 3}, "does not take"),
        ({"data": toy.clients(inputs=7)}, "does not take"),
        ({"data": [object()]}, "expected a map-style dataset"),
    ],
)
def test_bad_input_is_one_line(options, words):
    with pytest.raises(UserError, match=words) as caught:
        simulate(**options)
    assert "\n" not in str(caught.value)


def test_cohorts_that_run_out_say_so():
    sim = simulate(cohorts=[[0]])
    sim.round()
    with pytest.raises(UserError, match="given for 1 rounds"):
        sim.round()


def test_state_of_another_algorithm_is_refused():
    with pytest.raises(UserError, match="state of FedAvg"):
        simulate(algorithm=create("scaffold")).load_state_dict(simulate().state_dict())


# ------------------------------------------------------------------ data, sampling


def test_subset_dataset_and_list_give_the_same_batches():
    x, y = torch.randn(30, 6), torch.randint(3, (30,))
    whole = TensorDataset(x, y)
    index = torch.randperm(30)[:12]
    nested = Subset(Subset(whole, list(range(29, -1, -1))), [29 - int(i) for i in index])
    kinds = [nested, TensorDataset(x[index], y[index]), [(x[i], y[i]) for i in index.tolist()]]
    found = []
    for kind in kinds:
        sim = simulate(data=[kind], cohorts=[[0]] * 2)
        sim.run(2)
        found.append(sim.flat)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_sampled_cohorts_are_uniform_and_change():
    sim = simulate(data=toy.clients((4,) * 10), cohorts=None, fraction=0.3)
    drawn = []
    for _ in range(200):
        drawn.append(sim.cohort())
        sim.done += 1
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=10)
    assert all(len(set(c)) == 3 for c in drawn)
    assert counts.sum() == 600
    # Binomial(200, .3): 60 +- 4.5 standard deviations.
    assert int(counts.min()) > 30
    assert int(counts.max()) < 90


def test_history_and_evaluation():
    data = toy.clients()
    sim = simulate(data=data)
    history = sim.run(4, test=data[3], val=data[0], eval_every=2)
    assert [row["round"] for row in history] == [1, 2, 3, 4]
    assert [round for round, _ in history.curve("test/accuracy")] == [2, 4]
    model, (x, y) = sim.model.eval(), data[3].tensors
    with torch.no_grad():
        out = model(x)
    assert history.last("test/accuracy") == pytest.approx(float((out.argmax(1) == y).float().mean()))
    assert history.last("test/loss") == pytest.approx(float(nn.functional.cross_entropy(out, y)), abs=1e-6)
    assert history.rounds_to("test/accuracy", 2.0) is None
    assert history.rounds_to("test/accuracy", 0.0) == 2


def test_schedules_over_rounds():
    sim = simulate(algorithm=create("fedavg", lr=0.1), cohorts=[[0]] * 3)
    assert [row["lr"] for row in sim.run(3)] == [0.1 * 0.998 ** (t + 1) for t in range(3)]
    cosine = simulate(algorithm=create("fedavg", lr=0.1, round_lr="cosine"), cohorts=[[0]] * 4)
    assert [row["lr"] for row in cosine.run(4)] == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], abs=1e-6)


def test_states_beyond_the_bound_are_mapped_from_files():
    sim, free = (simulate(algorithm=create("scaffold"), state_memory_mib=m) for m in (0.0003, None))
    sim.run(5)
    free.run(5)
    assert sim.store.in_memory <= 0.0003 * 2**20
    assert torch.equal(sim.flat, free.flat)
    for client in sim.client_states:
        assert torch.equal(sim.client_states[client]["c"], free.client_states[client]["c"])


def test_auto_says_what_it_chose_keeps_the_bits_and_a_resumed_run_keeps_the_choice(monkeypatch, caplog):
    serial = simulate()
    serial.run(4)
    for bound, engine in ((0.0, "pool"), (1e9, "serial")):
        monkeypatch.setattr("fedcore.simulation.POOL_FROM_SECONDS", bound)
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
        with simulate(engine="auto") as sim, caplog.at_level(logging.INFO, "fedcore"):
            sim.run(4)
            assert sim.engine == engine
            assert f"engine {engine}: a round took" in caplog.text
            assert torch.equal(sim.flat, serial.flat)
            resumed = simulate(engine="auto")
            resumed.load_state_dict(sim.state_dict())
            assert resumed.engine == engine


def test_a_saved_state_stands_still_and_replaces_what_was_there():
    first = simulate(algorithm=create("scaffold"), cohorts=[[0, 1], [1, 2], [0, 2]])
    first.round()
    saved = first.state_dict()
    before = {client: tree["c"].clone() for client, tree in saved["clients"].items()}
    first.round()
    first.round()
    assert {client: torch.equal(tree["c"], before[client]) for client, tree in saved["clients"].items()} == {
        0: True,
        1: True,
    }
    first.load_state_dict(saved)
    assert sorted(first.client_states) == [0, 1]
