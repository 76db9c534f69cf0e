"""The same federation on two engines, and what differs between them."""

import torch
from fedcore import Simulation
from fedcore.algorithms import ALGORITHMS
from fedcore.lora import inject
from fedcore.privacy import PrivacyConfig, PrivateSimulation
from torch import nn
from torch.utils.data import TensorDataset

SIZES = (7, 12, 5, 9, 12, 1)
COHORTS = [[0, 1, 2], [1, 3, 4, 5], [0, 1, 2, 3, 4, 5], [2, 4]]


def clients(sizes=SIZES, shape=(6,), dtype=torch.float32, seed=0, classes=3):
    draw = torch.Generator().manual_seed(seed)
    return [
        TensorDataset(
            torch.randn(size, *shape, generator=draw, dtype=dtype), torch.randint(classes, (size,), generator=draw)
        )
        for size in sizes
    ]


def mlp(dropout=0.3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3))


RANKS = (1, 3, 2, 3, 1, 2)
"""of the clients' adapters"""


def federation_of(name, dtype=torch.float32, equal=False, dropout=0.3):
    """``model`` and further options of ``simulate`` that a registered algorithm needs: adapters for those tagged so.

    ``equal``: all of one rank, also where ranks may differ.
    """
    info = ALGORITHMS.info(name)
    if "lora" not in info.tags:
        return {"model": lambda: mlp(dropout).to(dtype)}
    ranks = [2] * len(RANKS) if equal or ALGORITHMS.load(name).equal_ranks else RANKS
    return {"model": lambda: lambda rank: inject(mlp(dropout).to(dtype), rank), "ranks": ranks}


PRIVACY = PrivacyConfig(clip=0.5, noise_multiplier=0.3, deterministic_noise_for_tests=True, unsafe_debug_metrics=True)


class Convolution(nn.Module):
    """Not a stack of linear layers; with a constant buffer, a frozen layer and tied weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.convolution = nn.Conv1d(1, 2, 3)
        self.norm = nn.GroupNorm(1, 2)
        self.mix = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.mix.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 3)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6))

    def forward(self, x):
        hidden = self.norm(self.convolution((x * self.scale).unsqueeze(1))).flatten(1)
        return self.head(self.frozen(self.again(torch.tanh(self.mix(hidden)))))


def simulate(algorithm, model=None, data=None, engine="serial", **options):
    options = {"batch_size": 4, "local_epochs": 2, "cohorts": COHORTS, "rounds": 4, **options}
    if algorithm.private:
        options = {"max_steps": 5, "exact_steps": True, "privacy": PRIVACY, **options}
        return PrivateSimulation(model or mlp(), data or clients(), algorithm, engine=engine, **options)
    return Simulation(model or mlp(), data or clients(), algorithm, engine=engine, **options)


def run(sim, rounds=None):
    """Rows of the rounds, without times; worker processes are ended."""
    with sim:
        rows = [sim.round() for _ in range(rounds or len(sim.cohorts))]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def state(sim):
    return {
        "flat": sim.flat,
        "server": sim.server_state,
        "clients": {i: dict(kept) for i, kept in sim.client_states.items()},
        "buffers": sim.buffers,
    }
