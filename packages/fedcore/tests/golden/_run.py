"""Run any algorithm on the softmax regression of ``_softmax.py`` through ``Simulation``: float64, stored order."""

import torch
import torch.nn.functional as F
from fedcore import Simulation
from torch import nn
from torch.utils.data import TensorDataset


def model(problem):
    """The linear model in float64 at the problem's initial parameters."""
    dim = problem.inputs[0].shape[1]
    net = nn.Linear(dim, problem.classes).double()
    start = torch.from_numpy(problem.start)
    with torch.no_grad():
        net.weight.copy_(start[: problem.classes * dim].reshape(problem.classes, dim))
        net.bias.copy_(start[problem.classes * dim :])
    return net


def datasets(problem):
    """The clients as ``TensorDataset``."""
    pairs = zip(problem.inputs, problem.targets, strict=True)
    return [TensorDataset(torch.from_numpy(x), torch.from_numpy(y)) for x, y in pairs]


def simulation(
    algorithm,
    problem,
    *,
    cohorts=None,
    rounds=3,
    loss_scale=1.0,
    batch_size=4,
    local_epochs=2,
    max_steps=0,
    weighting="uniform",
    engine="serial",
    shuffle=False,
    **options,
):
    """A ``Simulation`` with batches in stored order; all clients in every round unless ``cohorts`` are given."""
    cohorts = [problem.everyone] * rounds if cohorts is None else [list(c) for c in cohorts]
    return Simulation(
        model(problem),
        datasets(problem),
        algorithm,
        loss=lambda out, y, reduction="mean": loss_scale * F.cross_entropy(out, y, reduction=reduction),
        batch_size=batch_size,
        local_epochs=local_epochs,
        max_steps=max_steps,
        cohorts=cohorts,
        shuffle=shuffle,
        rounds=len(cohorts),
        weighting=weighting,
        engine=engine,
        **options,
    )


def trajectory(algorithm, problem, **options):
    """Flat parameters after each round, a list of (P,) float64 arrays, and the simulation (options as above)."""
    sim = simulation(algorithm, problem, **options)
    rounds = len(options["cohorts"]) if options.get("cohorts") is not None else options.get("rounds", 3)
    found = []
    for _ in range(rounds):
        sim.round()
        found.append(sim.flat.detach().clone().numpy())
    return found, sim
