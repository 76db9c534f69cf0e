"""Trajectories and server states of FedMuon and Local Muon against float64 NumPy, on three models."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from fedcore import Simulation
from fedcore.algorithms import create, fedmuon
from fedcore.ops import matrices
from torch import nn
from torch.utils.data import TensorDataset


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_muon{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


softmax, run, reference = _load("_softmax"), _load("_run"), _load("_muon_reference")

PAPER = {"nesterov": False, "orth": "svd", "mu_lr": 1.0, "conv_scale": "none"}
LOCAL = {"gamma": 0.0, "beta": 0.95, "aggregate_momentum": False, "align": False}
CASES = {
    "default": ("fedmuon", {}, {}),
    "gamma": ("fedmuon", {"gamma": 0.8, "beta": 0.7, "mu_lr": 0.5}, {}),
    "polar express": ("fedmuon", {"orth": "polar_express"}, {}),
    "svd": ("fedmuon", {"orth": "svd"}, {}),
    "no nesterov": ("fedmuon", {"nesterov": False}, {}),
    "standard form": ("fedmuon", {"ns_form": "standard"}, {}),
    "gram form": ("fedmuon", {"ns_form": "gram"}, {}),
    "no aggregation": ("fedmuon", {"aggregate_momentum": False}, {}),
    "no alignment": ("fedmuon", {"align": False}, {}),
    "gamma 0": ("fedmuon", {"gamma": 0.0}, {}),
    "compressed": ("fedmuon", {"momentum_rank_ratio": 0.6}, {}),
    "paper": ("fedmuon", {"variant": "paper"}, PAPER),
    "local": ("local_muon", {}, LOCAL),
}
PARTIAL = [[0, 3], [1, 2, 4], [3], [0, 1, 4], [2, 3]]
SCENARIOS = {
    "all": ({"lr": 0.01}, {"cohorts": [[0, 1, 2, 3, 4]] * 4}),
    "partial": ({"lr": 0.02, "round_lr": "constant", "weight_decay": 0.0, "clip_grad": 0.0}, {"cohorts": PARTIAL}),
    "clipped": (
        {"lr": 0.01, "clip_grad": 0.5, "weight_decay": 0.3},
        {"cohorts": PARTIAL, "max_steps": 5, "loss_scale": 1.5},
    ),
    "by size": ({"lr": 0.01}, {"cohorts": PARTIAL, "weighting": "samples"}),
}
NEEDLESS = ("variant", "ns_form")


def options_of(base, options, further):
    return reference.Options(**{k: v for k, v in {**base, **options}.items() if k not in NEEDLESS} | further)


def compare(found, sim, expected, is_matrix, options, atol):
    assert len(found) == len(expected.params)
    for theta, wanted in zip(found, expected.params, strict=True):
        np.testing.assert_allclose(theta, reference.flat(wanted), rtol=0, atol=atol)
    state = dict(sim.server_state)
    if options.aggregate_momentum:
        wanted = reference.flat(expected.momentum[-1], is_matrix)
        np.testing.assert_allclose(state.pop("momentum").numpy(), wanted, rtol=0, atol=atol)
    if options.align and options.gamma:
        wanted = reference.flat(expected.direction[-1])
        np.testing.assert_allclose(state.pop("direction").numpy(), wanted, rtol=0, atol=100 * atol)
    assert not state
    assert not sim.client_states


QUICK = {("default", scenario) for scenario in SCENARIOS} | set(zip(CASES, itertools.cycle(SCENARIOS), strict=False))
"""Every case in one scenario, every scenario with one case; the whole grid is slow."""
GRID = [
    pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in itertools.product(CASES, SCENARIOS)
]


@pytest.mark.parametrize(("case", "scenario"), GRID)
def test_softmax_regression(case, scenario):
    check_softmax(case, scenario, "serial")


@pytest.mark.parametrize(("case", "scenario"), [("default", "clipped"), ("compressed", "by size"), ("local", "all")])
def test_softmax_regression_of_clients_together(case, scenario):
    check_softmax(case, scenario, "batched")


def check_softmax(case, scenario, engine):
    name, options, further = CASES[case]
    base, shape = SCENARIOS[scenario]
    problem = softmax.make(seed=5)
    wanted = options_of(base, options, further)
    scale, steps = shape.get("loss_scale", 1.0), shape.get("max_steps", 0)
    shapes = [(problem.classes, 4), (problem.classes,)]

    def gradient(x, batch):
        flat = softmax.gradient(reference.flat(x), *batch, problem.classes, scale)
        return reference.split(flat, shapes)

    batches = [softmax.batches(problem, i, max_steps=steps) for i in problem.everyone]
    weighting = shape.get("weighting", "uniform")
    expected = reference.fedmuon(
        reference.split(problem.start, shapes),
        batches,
        gradient,
        [True, False],
        shape["cohorts"],
        wanted,
        lambda cohort: softmax.weights(problem, cohort, weighting),
    )
    found, sim = run.trajectory(create(name, **base, **options), problem, **shape, engine=engine)
    assert sim.engine == engine
    compare(found, sim, expected, [True, False], wanted, 1e-11)


# ---------------------------------------------------------------------- tensors of every shape

SHAPES = [(6, 4), (5,), (3, 5, 2), (4, 2, 3, 3), (9, 2, 1, 2), (7,), (2, 3, 2, 2, 2), (4, 6), (5, 4, 3, 1), (1, 1, 6)]
SLOPES = (0.7, 1.3)


class Shapes(nn.Module):
    """``slope * parameters - x``; with ``sum log cosh`` as loss the gradient is ``slope * tanh`` of that."""

    def __init__(self, start):
        super().__init__()
        self.tensors = nn.ParameterList([nn.Parameter(torch.from_numpy(t.copy())) for t in start])
        self.register_buffer("slope", torch.from_numpy(slope_of(start)))

    def forward(self, x):
        return self.slope * torch.cat([t.reshape(-1) for t in self.tensors]) - x


def slope_of(start):
    return np.linspace(*SLOPES, sum(t.size for t in start))


@pytest.fixture(params=[matrices.FEW, 0], ids=["few spans", "bridged"])
def spans(request, monkeypatch):
    """Tensor by tensor, and as for models of many tensors: momentum in long segments with gaps, class A gathered."""
    for module in (matrices, fedmuon):
        monkeypatch.setattr(module, "FEW", request.param)
    monkeypatch.setattr(matrices, "SWALLOWED", 1.0)
    matrices._layout.cache_clear()
    yield
    matrices._layout.cache_clear()


@pytest.mark.parametrize(
    ("name", "options", "further"),
    [
        *CASES.values(),
        ("fedmuon", {"conv_scale": "official"}, {}),
        ("fedmuon", {"conv_scale": "none", "momentum_rank_ratio": 0.3}, {}),
    ],
    ids=str,
)
def test_tensors_of_every_shape(name, options, further, spans):
    rng = np.random.default_rng(3)
    start = [rng.normal(size=shape) for shape in SHAPES]
    size = sum(t.size for t in start)
    data = [rng.normal(size=(n, size)) + 2 * rng.normal(size=size) for n in (4, 6, 3)]
    base = {"lr": 0.005, "clip_grad": 3.0}
    wanted = options_of(base, options, further)
    is_matrix = [len(shape) > 1 for shape in SHAPES]
    slope = slope_of(start)

    def gradient(x, batch):
        return reference.split((slope * np.tanh(slope * reference.flat(x) - batch)).mean(axis=0), SHAPES)

    cohorts = [[0, 1], [1, 2], [0, 1, 2]]
    batches = [[x[i : i + 2] for i in range(0, len(x), 2)] for x in data]
    expected = reference.fedmuon(start, batches, gradient, is_matrix, cohorts, wanted)
    sim = Simulation(
        Shapes(start),
        [TensorDataset(torch.from_numpy(x), torch.zeros(len(x))) for x in data],
        create(name, **base, **options),
        loss=lambda out, _: out.cosh().log().sum(dim=1).mean(),
        batch_size=2,
        cohorts=cohorts,
        shuffle=False,
        rounds=len(cohorts),
        engine="serial",
    )
    found = []
    for _ in cohorts:
        sim.round()
        found.append(sim.flat.clone().numpy())
    compare(found, sim, expected, is_matrix, wanted, 1e-10)


# ---------------------------------------------------------------------- a network of two layers


def network_gradient(x, batch):
    """Gradient of the mean cross-entropy of ``W2 tanh(W1 x + b1) + b2``, by hand."""
    (w1, b1, w2, b2), (inputs, targets) = x, batch
    hidden = np.tanh(inputs @ w1.T + b1)
    logits = hidden @ w2.T + b2
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(targets)), targets] -= 1
    p /= len(targets)
    back = (p @ w2) * (1 - hidden**2)
    return [back.T @ inputs, back.sum(axis=0), p.T @ hidden, p.sum(axis=0)]


@pytest.mark.parametrize("muon_params", ["all2d", "hidden"])
@pytest.mark.parametrize("case", ["default", "compressed", "local"])
def test_network_of_two_layers(case, muon_params):
    name, options, further = CASES[case]
    problem = softmax.make(seed=8)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    start = [p.detach().numpy().copy() for p in net.parameters()]
    base = {"lr": 0.01}
    wanted = options_of(base, options, further)
    is_matrix = [True, False, muon_params == "all2d", False]  # the last layer is no hidden one
    batches = [softmax.batches(problem, i) for i in problem.everyone]
    expected = reference.fedmuon(start, batches, network_gradient, is_matrix, PARTIAL, wanted)
    sim = Simulation(
        net,
        run.datasets(problem),
        create(name, **base, **options, muon_params=muon_params),
        batch_size=softmax.BATCH,
        local_epochs=softmax.EPOCHS,
        cohorts=PARTIAL,
        shuffle=False,
        rounds=len(PARTIAL),
        engine="serial",
    )
    found = []
    for _ in PARTIAL:
        sim.round()
        found.append(sim.flat.clone().numpy())
    compare(found, sim, expected, is_matrix, wanted, 1e-10)
