"""Every method on adapters learns more than training the head alone, on real digits turned by a quarter."""

from __future__ import annotations

import pytest
import torch
from fedcore import Simulation
from fedcore.algorithms import ALGORITHMS, create
from fedcore.data.digits import Digits
from fedcore.lora import inject
from torch import nn
from torch.utils.data import TensorDataset

ROUNDS, LR = 4, 1e-2
RIVALS = [row.name for row in ALGORITHMS if "lora" in row.tags and row.name != "lora_head"]


@pytest.fixture(scope="module")
def world():
    """A base trained on upright digits below five with a fresh head; three clients with few classes each; test set."""
    digits, draw = Digits(test_samples=700).read_split("train"), torch.Generator().manual_seed(0)
    pictures, labels = digits.inputs, digits.targets
    pictures = pictures[:, 0]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = pictures[labels < 5].flatten(1), labels[labels < 5]
    parameters = list(net.parameters())
    for _ in range(150):
        index = torch.randint(len(y), (32,), generator=draw)
        grads = torch.autograd.grad(nn.functional.cross_entropy(net(x[index]), y[index]), parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.sub_(grad, alpha=0.3)
    torch.manual_seed(1)
    net[4] = nn.Linear(64, 10)
    turned = torch.rot90(pictures, 1, (1, 2)).flatten(1)
    train, test = slice(0, 480), slice(480, None)
    owner = (labels[train] + torch.randint(2, (480,), generator=draw)) % 3
    clients = [TensorDataset(turned[train][owner == i], labels[train][owner == i]) for i in range(3)]
    return net, clients, TensorDataset(turned[test], labels[test])


def accuracy(world, name, **options):
    net, clients, test = world
    algorithm = create(name, lr=LR, **options)
    sim = Simulation(
        lambda rank: inject(net, rank, init=algorithm.default_init),
        clients,
        algorithm,
        ranks=[4, 4, 4] if algorithm.equal_ranks else [2, 4, 6],
        fraction=1.0,
        batch_size=16,
        weighting="samples",
        engine="serial",
    )
    return sim.run(ROUNDS, test=test, eval_every=ROUNDS).rows[-1]["test/accuracy"]


@pytest.fixture(scope="module")
def floor(world):
    return accuracy(world, "lora_head")


@pytest.mark.parametrize("name", RIVALS)
def test_adapters_learn_more_than_the_head_alone(world, floor, name):
    assert accuracy(world, name) > floor + 0.03


def test_folding_without_variates_learns_too(world, floor):
    assert accuracy(world, "ilora", residual="fold", cv=False) > floor + 0.03
