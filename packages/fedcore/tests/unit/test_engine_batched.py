"""The batched engine against the serial one: every algorithm to 1e-12 in float64, failures, and when it steps back."""

from __future__ import annotations

import importlib.util
import logging
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fedcore import RoundError, Simulation
from fedcore.algorithms import ALGORITHMS, create
from fedcore.engines import batched
from torch import nn
from torch.utils.data import Subset, TensorDataset


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_batched{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


engines = _load("_engines")
f64 = partial(engines.clients, dtype=torch.float64)


def flattened(tree, prefix=""):
    """Nested dicts of tensors and numbers as one flat dict."""
    found = {}
    for name, value in tree.items():
        found |= flattened(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def close(first, second, bound=1e-12):
    """Whether two trees agree, each tensor relative to its largest entry."""
    first, second = flattened(first), flattened(second)
    assert list(first) == list(second)
    for name, value in first.items():
        a, b = torch.as_tensor(value, dtype=torch.float64), torch.as_tensor(second[name], dtype=torch.float64)
        assert a.shape == b.shape, name
        worst = float((a - b).abs().max()) if a.numel() else 0.0
        assert worst <= bound * max(1.0, float(b.abs().max())), f"{name} differs by {worst}"


def pair(algorithm, model, data, **options):
    """Both engines, run; fails unless the second one was really batched."""
    serial = engines.simulate(algorithm, model(), data() if callable(data) else data, **options)
    other = engines.simulate(algorithm, model(), data() if callable(data) else data, "batched", **options)
    rows = engines.run(serial), engines.run(other)
    assert other.engine == "batched"
    return serial, other, rows


def same(algorithm, model=lambda: engines.mlp().double(), data=f64, **options):
    serial, other, rows = pair(algorithm, model, data, **options)
    close(engines.state(serial), engines.state(other))
    for a, b in zip(*rows, strict=True):
        close(a, b)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS.names() if not ALGORITHMS.load(name).shifts_base])
def test_every_algorithm_equals_serial(name, caplog):
    dropout = 0.0 if ALGORITHMS.load(name).adapters else 0.3  # torch.func, which adapters need, has no draws
    with caplog.at_level(logging.WARNING):
        same(create(name, lr=0.05), **engines.federation_of(name, torch.float64, equal=True, dropout=dropout))
    assert not [record for record in caplog.records if "one by one" in record.getMessage()]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedmoswa", {"option": "I"}),
        ("fedmoswa", {"divisor": "code"}),
        ("fedmuon", {"orth": "svd", "momentum_rank_ratio": 0.4}),
        ("fedmuon", {"muon_params": "hidden", "orth": "polar_express"}),
        ("fedadamw", {"v_blocks": "full", "mix": True}),
        ("fedadamw", {"v_blocks": "none", "no_decay_1d": True}),
        ("fedspeed", {"alpha": 0.5}),
        ("fedavg", {"weight_decay": 0.0, "clip_grad": 0.0}),
        ("fedavg", {"clip_grad": 0.01}),
    ],
)
def test_options_that_take_other_paths(name, options):
    same(create(name, lr=0.05, **options))


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedsam", "fedmoswa", "fedadamw", "fedmuon"])
def test_other_models_equal_serial(name):
    """Convolution, norm, frozen and tied weights, a constant buffer, by ``torch.func``."""
    same(create(name, lr=0.05), lambda: engines.Convolution().double())


@pytest.mark.parametrize("name", ["scaffold", "fedadamw", "fedmuon"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 3},
        {"max_steps": 1},
        {"batch_size": 50},
        {"batch_size": 1, "max_steps": 7},
        {"shuffle": False, "weighting": "samples"},
    ],
)
def test_plans(name, options):
    same(create(name, lr=0.05), **options)


def test_a_tensor_that_never_gets_a_gradient_is_left_alone():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.head, self.idle = nn.Linear(6, 3), nn.Linear(4, 4)

        def forward(self, x):
            return self.head(x)

    for name in ("fedmuon", "fedadamw"):
        same(create(name, lr=0.05), lambda: Idle().double())


def test_groups_of_clients_that_fit_the_cache(monkeypatch):
    monkeypatch.setattr(batched, "STACK_BYTES", 8 * 53 * 2)  # two clients
    same(create("scaffold", lr=0.05))


def test_memory_that_runs_out_halves_the_stack(monkeypatch, caplog):
    whole = batched._Stack.train
    seen = []

    def train(stack):
        seen.append(len(stack.clients))
        if len(stack.clients) > 2:
            raise torch.OutOfMemoryError
        return whole(stack)

    monkeypatch.setattr(batched._Stack, "train", train)
    same(create("scaffold", lr=0.05))
    assert max(seen) == 3
    assert "out of memory" in caplog.text


# ------------------------------------------------------------------ layers, losses, data


LAYERS = [
    lambda: nn.Sequential(nn.Linear(6, 3)),
    lambda: nn.Linear(6, 3, bias=False),
    lambda: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True)), nn.Linear(4, 3)),
    lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 5), nn.GELU(), nn.Dropout(0.2), nn.Linear(5, 3, bias=False)),
    lambda: nn.Sequential(nn.Tanh(), nn.Linear(6, 7), nn.Identity(), nn.Softplus(), nn.Dropout(0.0), nn.Linear(7, 3)),
    lambda: nn.Sequential(nn.Linear(6, 3), nn.LeakyReLU()),
]


@pytest.mark.parametrize("index", range(len(LAYERS)))
def test_stacks_of_linear_layers(index):
    def model():
        torch.manual_seed(3)
        return LAYERS[index]().double()

    same(create("fedavg", lr=0.05), model)
    same(create("fedmoswa", lr=0.05, option="I"), model)


def test_pictures_are_flattened():
    data = f64(shape=(1, 2, 3))
    same(create("fedavg", lr=0.05), lambda: nn.Sequential(nn.Flatten(), *engines.mlp()).double(), data)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (partial(F.cross_entropy, label_smoothing=0.1), None),
        (F.mse_loss, torch.float64),
        (F.smooth_l1_loss, torch.float64),
    ],
)
def test_losses(loss, targets):
    data = f64()
    if targets:
        data = [TensorDataset(d.tensors[0], torch.tanh(d.tensors[0][:, :3])) for d in data]
    same(create("fedavg", lr=0.05), data=data, loss=loss)


class Gathered:
    """Data that gathers its own batches."""

    def __init__(self, dataset, draws=False, breaks_at=None):
        self.dataset, self.breaks_at, self.calls = dataset, breaks_at, 0
        self.augment = "noise" if draws else None

    def __len__(self):
        return len(self.dataset)

    def batch(self, indices, generator):
        self.calls += 1
        if self.breaks_at is not None and self.calls > self.breaks_at:
            raise OSError("disk gone")
        x, y = self.dataset[indices]
        if generator is not None:
            x = x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x, y


def kinds():
    data = f64()
    x, y = (torch.cat([d.tensors[i] for d in data]) for i in range(2))
    starts = [sum(engines.SIZES[:i]) for i in range(len(engines.SIZES))]
    whole = TensorDataset(x, y)
    return {
        "subsets of one set": [Subset(whole, range(a, a + n)) for a, n in zip(starts, engines.SIZES, strict=True)],
        "lists of samples": [[(d.tensors[0][i], int(d.tensors[1][i])) for i in range(len(d))] for d in data],
        "own batches": [Gathered(d) for d in data],
        "augmentation": [Gathered(d, draws=i % 2 == 0) for i, d in enumerate(data)],
    }


@pytest.mark.parametrize("kind", list(kinds()))
def test_kinds_of_data(kind):
    same(create("fedmoswa", lr=0.05, option="I"), data=lambda: kinds()[kind])


def test_augmentation_that_draws_changes_the_result():
    plain = engines.simulate(create("fedavg"), engines.mlp().double(), kinds()["own batches"], "batched")
    drawn = engines.simulate(create("fedavg"), engines.mlp().double(), kinds()["augmentation"], "batched")
    assert engines.run(plain, 1)[0]["loss"] != engines.run(drawn, 1)[0]["loss"]


# ------------------------------------------------------------------ failures


def poisoned(value, client=1):
    data = f64()
    x = data[client].tensors[0].clone()
    x[0] = value
    return [*data[:client], TensorDataset(x, data[client].tensors[1]), *data[client + 1 :]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("model", [engines.mlp, engines.Convolution])
def test_one_client_that_diverges_is_dropped_alone(value, model, caplog):
    data = poisoned(value)
    with caplog.at_level(logging.WARNING):
        same(create("scaffold", lr=0.05), lambda: model().double(), data)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("client 1 dropped: delta is not finite" in line for line in lines) == 6  # three rounds, two engines
    assert not any("one by one" in line for line in lines)


def test_no_data_is_dropped():
    data = f64((7, 0, 5, 9, 12, 1))
    serial, other, rows = pair(create("scaffold", lr=0.05), lambda: engines.mlp().double(), data)
    assert [row["clients"] for row in rows[1]] == [2, 3, 5, 2]
    close(engines.state(serial), engines.state(other))


@pytest.mark.parametrize("breaks_at", [1, 2])
def test_data_that_raises_drops_its_client(breaks_at, caplog):
    def data():
        return [Gathered(d, breaks_at=breaks_at if i == 2 else None) for i, d in enumerate(f64())]

    options = {"cohorts": [[0, 2, 4]], "rounds": 1}
    serial, other, rows = pair(create("scaffold", lr=0.05), lambda: engines.mlp().double(), data, **options)
    assert rows[1][0]["clients"] == 2
    assert caplog.text.count("client 2 dropped: OSError: disk gone") == 2
    close(engines.state(serial), engines.state(other))


def test_a_class_that_the_model_does_not_know_drops_its_client(caplog):
    data = f64()
    data[1].tensors[1][0] = 7
    serial, other, rows = pair(create("scaffold", lr=0.05), lambda: engines.mlp().double(), data)
    assert [row["clients"] for row in rows[1]] == [2, 3, 5, 2]
    assert "client 1 dropped: IndexError: Target 7 is out of bounds" in caplog.text
    close(engines.state(serial), engines.state(other))


def test_a_round_in_which_all_fail_changes_nothing():
    data = [TensorDataset(torch.full_like(d.tensors[0], torch.nan), d.tensors[1]) for d in f64()]
    sim = engines.simulate(create("fedavg"), engines.mlp().double(), [*data[:5], f64()[5]], "batched")
    before = sim.flat.clone()
    with pytest.raises(RoundError, match="all 3 clients failed; first: delta is not finite"):
        sim.round()
    assert torch.equal(sim.flat, before)


# ------------------------------------------------------------------ when it steps back


class Branches(nn.Linear):
    def forward(self, x):
        hidden = super().forward(x)
        return hidden if float(hidden.detach().sum()) > 0 else 2 * hidden


class Draws(nn.Linear):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


class Loose(nn.Linear):
    """Takes sequences of any length."""

    def forward(self, x):
        return super().forward(x.mean(dim=1))


def sequences():
    return [TensorDataset(torch.randn(6, 2 + i, 6), torch.zeros(6, dtype=torch.long)) for i in range(3)]


REASONS = {
    "buffers": (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), {}, "running_mean changes in training"),
    "branches": (lambda: Branches(6, 3), {}, "cannot transform"),
    "draws": (lambda: Draws(6, 3), {}, "cannot transform.*random"),
    "loss": (lambda: nn.Linear(6, 3), {"loss": lambda out, y: F.cross_entropy(out, y)}, "no loss of single samples"),
    "weights": (
        lambda: nn.Linear(6, 3),
        {"loss": partial(F.cross_entropy, weight=torch.tensor([1.0, 5.0, 25.0]))},
        "not the mean over its samples",
    ),
}


@pytest.mark.parametrize("reason", list(REASONS))
def test_models_that_cannot_be_batched_run_serial_and_say_why(reason, caplog):
    model, options, words = REASONS[reason]
    found = []
    for engine in ("batched", "serial"):
        torch.manual_seed(0)
        sim = engines.simulate(create("fedavg"), model(), engine=engine, **options)
        engines.run(sim, 2)
        found.append(sim.flat)
        assert sim.engine == "serial"
    lines = [record.getMessage() for record in caplog.records if record.name == "fedcore.engines.batched"]
    assert len(lines) == 1
    assert re.search(words, lines[0])
    assert torch.equal(*found)


def test_targets_that_the_loss_leaves_out_are_not_batched(caplog):
    data = engines.clients()
    data[5].tensors[1][0] = -100
    sim = engines.simulate(create("fedavg"), data=data, engine="batched")
    engines.run(sim, 1)
    assert sim.engine == "serial"
    assert "targets below zero" in caplog.text


def test_unequal_ranks_run_serial(caplog):
    def model(rank):
        torch.manual_seed(rank)
        return nn.Linear(6, 3)

    sim = Simulation(
        model, engines.clients(), create("fedavg"), ranks=[1, 2, 1, 2, 1, 2], cohorts=[[0, 2]], engine="batched"
    )
    engines.run(sim)
    assert sim.engine == "serial"
    assert "differ in rank" in caplog.text


def test_samples_of_unequal_shape_are_trained_one_by_one(caplog):
    torch.manual_seed(0)
    sim = engines.simulate(create("fedavg"), Loose(6, 3), sequences(), "batched", cohorts=[[0, 1, 2]])
    assert engines.run(sim)[0]["clients"] == 3
    assert "differ in shape" in caplog.text
    torch.manual_seed(0)
    plain = engines.simulate(create("fedavg"), Loose(6, 3), sequences(), cohorts=[[0, 1, 2]])
    engines.run(plain)
    assert torch.equal(sim.flat, plain.flat)
