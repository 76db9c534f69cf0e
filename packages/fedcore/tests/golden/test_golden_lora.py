"""Trajectories and states of all methods on adapters against float64 NumPy, with dense matrices there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from fedcore import Simulation
from fedcore.algorithms import ALGORITHMS, create
from fedcore.lora import LoraLinear
from torch import nn
from torch.utils.data import TensorDataset


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_lora_methods{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _load("_lora_methods_reference")
UNEQUAL, EQUAL = (1, 3, 2, 3), (2, 2, 2, 2)
SAME = {1: 2.0, 2: 2.0, 3: 2.0}
ALL, PARTIAL = [[0, 1, 2, 3]] * 4, [[0, 1], [2, 3], [0, 1, 2], [1, 3]]

CASES = [
    ("lora_head", {}),
    ("fedit", {}),
    ("ffa_lora", {}),
    ("rolora", {}),
    ("flora", {"restart": "start"}),
    ("flexlora", {}),
    ("hetlora", {}),
    ("hetlora", {"prune": 5.0, "gamma": 0.6}),
    ("fedex_lora", {}),
    ("lora_fair", {}),
    ("lora_fair", {"lam": 0.5}),
    ("ilora", {}),
    ("ilora", {"cv": False}),
    ("ilora", {"cv_rows": "all", "control_scale": 0.25}),
    ("ilora", {"residual": "fold"}),
    ("ilora", {"residual": "fold", "cv": False, "decomposition": "svd"}),
    ("ilora", {"decomposition": "qr_pivoted"}),
    ("ilora", {"decomposition": "svd", "control_batches": 2}),
    ("ilora", {"cv_transport": True}),
    ("ilora", {"cv_transport": True, "residual": "fold", "control_batches": 9}),
]
SCENARIOS = {
    "all": {"cohorts": ALL},
    "partial": {"cohorts": PARTIAL, "weighting": "uniform", "weight_decay": 0.2, "clip_grad": 0.3},
    "sgd": {"cohorts": PARTIAL, "optimizer": "sgd", "lr": 0.1, "weight_decay": 0.01},
}


class Network(nn.Module):
    def __init__(self, problem, base, vector, scaling):
        super().__init__()
        self.problem = problem
        layers = []
        for i in reference.LAYERS:
            linear = nn.Linear(base[i].shape[1], base[i].shape[0], dtype=torch.float64)
            with torch.no_grad():
                linear.weight.copy_(torch.from_numpy(base[i]))
                linear.bias.copy_(torch.from_numpy(problem.bias[i]))
            factors = torch.from_numpy(vector[f"A{i}"]), torch.from_numpy(vector[f"B{i}"])
            layers.append(LoraLinear(linear, factors[0].shape[0], scaling, factors=factors))
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(reference.HIDDEN[-1], reference.CLASSES, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(problem.head["W"]))
            self.head.bias.copy_(torch.from_numpy(problem.head["b"]))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


NAMES = {
    **{f"A{i}": f"layers.{i}.lora_A.default.weight" for i in reference.LAYERS},
    **{f"B{i}": f"layers.{i}.lora_B.default.weight" for i in reference.LAYERS},
    "W": "head.weight",
    "b": "head.bias",
}


def simulation(algorithm, world, engine="serial"):
    problem = world.problem
    data = [
        TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
        for x, y in zip(problem.inputs, problem.targets, strict=True)
    ]
    return Simulation(
        lambda rank: Network(problem, *world.starts[rank], world.scaling[rank]),
        data,
        algorithm,
        ranks=world.ranks,
        batch_size=reference.BATCH,
        local_epochs=reference.EPOCHS,
        cohorts=world.cohorts,
        shuffle=False,
        rounds=len(world.cohorts),
        weighting=world.weighting,
        engine=engine,
    )


def compared(name, options, scenario, *, ranks=None, scaling=SAME, init=None, seed=5):
    """Run both; fails where a vector, an evaluated weight or c differs. Returns the simulation and the reference."""
    kind = ALGORITHMS.load(name)
    ranks = ranks or (EQUAL if kind.equal_ranks else UNEQUAL)
    init = init or kind.default_init
    shared = {"lr": 0.02, **scenario}
    world = reference.World(reference.make(seed), ranks, scaling, init=init, **shared)
    algorithm = create(name, **options, **{k: v for k, v in shared.items() if k not in ("cohorts", "weighting")})
    reference.METHODS[name](world, **{k: v for k, v in options.items() if k != "restart"})
    sim = simulation(algorithm, world)
    for expected, effective in zip(world.trajectory, world.effective, strict=True):
        sim.round()
        for short, long in NAMES.items():
            np.testing.assert_allclose(sim.params[long].numpy(), expected[short], rtol=0, atol=1e-9, err_msg=short)
        net = sim.model
        for i in reference.LAYERS:
            layer = net.layers[i]
            found = layer.base_layer.weight + layer.delta_weight()
            np.testing.assert_allclose(found.detach().numpy(), effective[i], rtol=0, atol=1e-9)
    return sim, world


@pytest.mark.parametrize("scenario", ["all", "partial", pytest.param("sgd", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else str(v))
def test_trajectory(name, options, scenario):
    sim, world = compared(name, options, SCENARIOS[scenario])
    moves = [np.abs(b["W"] - a["W"]).max() for a, b in zip(world.trajectory, world.trajectory[1:], strict=False)]
    assert min(moves) > 1e-4
    if sim.algorithm.keeps_state and name == "ilora":
        for short, long in NAMES.items():
            c = sim.learner.spec.unflatten(sim.server_state["c"])[long]
            np.testing.assert_allclose(c.numpy(), world.c[short], rtol=0, atol=1e-9)
        for client, state in sim.client_states.items():
            spec = sim.algorithm.spec.ranks[world.ranks[client]]
            for short, long in NAMES.items():
                found = spec.unflatten(state["c"])[long].numpy()
                np.testing.assert_allclose(found, world.own[client][short], rtol=0, atol=1e-9)


ROWS = [row.name for row in ALGORITHMS if "lora" in row.tags]


@pytest.mark.parametrize(
    "name", [n if n in ("ilora", "flora") else pytest.param(n, marks=pytest.mark.slow) for n in ROWS]
)
@pytest.mark.parametrize("init", ["kaiming", "qr", "qr_scaled"])
def test_every_start(name, init):
    """Frozen weights differ by rank after a QR start, and must be the clients' own or the exact average."""
    options = {"restart": "start"} if name == "flora" else {}
    unfit = name == "ffa_lora" and init == "qr_scaled"  # its A differ by rank
    compared(name, options, SCENARIOS["partial"], init=init, ranks=EQUAL if unfit else None)


@pytest.mark.parametrize(
    ("name", "options"), [c for c in CASES if c[0] not in ("ffa_lora", "rolora", "fedex_lora")], ids=str
)
def test_unequal_scalings(name, options):
    """PEFT's alpha over unequal ranks: aggregates are of s_k B_k A_k."""
    compared(name, options, SCENARIOS["all"], scaling={1: 4.0, 2: 2.0, 3: 4 / 3})


def test_pruning_drops_ranks_in_the_scenario_that_is_said_to_prune():
    sim, world = compared("hetlora", {"prune": 5.0, "gamma": 0.6}, SCENARIOS["all"])
    kept = {k: [world.kept[k][i] for i in reference.LAYERS] for k in range(4)}
    assert {k: s["rank"].tolist() for k, s in sim.client_states.items()} == kept
    assert any(rank < UNEQUAL[k] for k, ranks in kept.items() for rank in ranks)
