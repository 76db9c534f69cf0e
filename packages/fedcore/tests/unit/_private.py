"""Private simulations for the unit tests, and a method whose uploads the test writes."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from fedcore.algorithm import Algorithm
from fedcore.algorithms import create
from fedcore.privacy import PrivacyConfig, PrivateSimulation


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_private{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = _load("_toy")
TEST_SWITCH = {"deterministic_noise_for_tests": True}


def private(privacy=None, algorithm=None, model=None, data=None, **options):
    settings = PrivacyConfig(**{"clip": 0.5, "noise_multiplier": 1.0, **(privacy or {})})
    options = {"batch_size": 4, "fraction": 0.5, "engine": "serial", "seed": 3, **options}
    data = data or toy.clients((8,) * 10)
    return PrivateSimulation(model or toy.mlp(), data, algorithm or create("dp_fedavg"), privacy=settings, **options)


@dataclass(frozen=True, kw_only=True)
class Puppet(Algorithm):
    """Uploads what the test wants: ``scripts[id]``, a value for all numbers, or an error."""

    reduction = "sum"
    private = True
    keeps_state = True
    scripts: dict

    def empty_upload(self, params, ctx):
        return {"delta": torch.zeros_like(params)}

    def client_init(self, ctx, client):
        return {"id": torch.tensor(float(client.id))}

    def local_finish(self, start, params, message, state, local, ctx):
        value = self.scripts.get(int(state["id"]), 0.0)
        if value == "raise":
            raise ValueError("patient 17 of the ward")
        if value == "short":
            return {"delta": params[:3]}, state
        return {"delta": torch.full_like(params, value)}, state


def puppets(scripts, cohorts, clip=1.0, **options):
    settings = {"clip": clip, "noise_multiplier": 0.0}
    return private(
        settings, Puppet(scripts=scripts), cohorts=cohorts, model=toy.mlp().double(), data=DOUBLES, **options
    )


DOUBLES = toy.clients((8,) * 6, dtype=torch.float64)


def moved(sim):
    before = sim.flat.clone()
    sim.round()
    return sim.flat - before
