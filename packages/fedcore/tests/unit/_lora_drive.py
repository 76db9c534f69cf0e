"""A small federation with adapters on its first layer, and what its tests look at."""

import importlib.util
from pathlib import Path

import torch
from fedcore import Simulation
from fedcore.algorithm import Client, Context
from fedcore.algorithms import ALGORITHMS, create
from fedcore.lora import inject


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_lora{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy, engines = _load("_toy"), _load("_engines")
NAMES = [row.name for row in ALGORITHMS if "lora" in row.tags]
LAYER, HEAD = "0", "2"
D, K = 5, 6


def base():
    return toy.mlp().double()


def adapted(init="kaiming", scaling=2.0, **options):
    return lambda rank: inject(base(), rank, init=init, scaling=scaling, **options)


def simulate(algorithm, ranks=(1, 3, 2, 3), cohorts=None, model=None, data=None, **options):
    options = {"batch_size": 4, "local_epochs": 2, "engine": "serial", "rounds": 4, **options}
    data = toy.clients(dtype=torch.float64)[: len(ranks)] if data is None else data
    cohorts = cohorts or [list(range(len(ranks)))] * 4
    model = model or adapted(algorithm.default_init)
    return Simulation(model, data, algorithm, ranks=ranks, cohorts=cohorts, **options)


def weight(module):
    """What the adapted layer multiplies with, (d, k)."""
    layer = module.get_submodule(LAYER)
    return (layer.base_layer.weight + layer.delta_weight()).detach()


def evaluated(sim):
    return weight(sim.model).clone()


def alone(name, client, **options):
    """Weight and head of one client after its round."""
    sim = simulate(create(name, **options), cohorts=[[client]])
    sim.round()
    return evaluated(sim), sim.params[f"{HEAD}.weight"].clone()


def client(sim, rank, number=None):
    number = sim.ranks.index(rank) if number is None else number
    return Client(number, 5, 2, rank)


def context(sim, round=None):
    return Context(sim.done if round is None else round, 4, sim.num_clients, 2, 0.1, 0.1, 2, 2)


def upload(sim, rank, size):
    draw = torch.Generator().manual_seed(rank + int(100 * size))
    spec = sim.algorithm.spec.ranks[rank]
    return {p.name: size * torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in spec}


def product(upload):
    return upload[f"{LAYER}.lora_B.default.weight"] @ upload[f"{LAYER}.lora_A.default.weight"]
