"""Scores beside accuracy, by hand and through a simulation."""

from __future__ import annotations

import math

import pytest
import torch
from fedcore import Simulation, algorithms
from fedcore.scored import ScoredTask
from polymodal.errors import UserError
from torch import nn
from torch.utils.data import TensorDataset


class Fixed(nn.Module):
    """Its inputs are its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return self.scale * inputs


def test_scores_of_classes_over_batches() -> None:
    logits = torch.tensor([[2.0, 0], [0, 2], [0, 2], [2, 0], [0, 2]])
    targets = torch.tensor([0, 1, 0, 1, 1])  # guessed 0 1 1 0 1
    task = ScoredTask(Fixed(), nn.functional.cross_entropy, ("accuracy", "f1", "matthews"))
    found = task.evaluate([(logits[:2], targets[:2]), (logits[2:], targets[2:])])
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 2 / 6)
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / 6), "(TP TN - FP FN) / sqrt(3 * 3 * 2 * 2)"
    assert found["loss"] == pytest.approx((3 * right + 2 * wrong) / 5)


def test_scores_of_a_regression() -> None:
    outputs, targets = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 3.0, 2.0])
    task = ScoredTask(Fixed(), lambda out, t: (out.squeeze(-1) - t).pow(2).mean(), ("pearson", "spearman"))
    found = task.evaluate([(outputs, targets)])
    assert found["loss"] == pytest.approx((0 + 1 + 4) / 3)
    assert found["spearman"] == pytest.approx(0.5)
    assert found["pearson"] == pytest.approx(1 / math.sqrt(14 / 3 * 2))
    with pytest.raises(UserError, match="empty"):
        task.evaluate([])


def test_training_is_that_of_the_plain_model() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(24, 3, generator=draw)
    clients = [TensorDataset(x[i::3], (x[i::3, 0] > 0).long()) for i in range(3)]

    def run(wrap) -> Simulation:
        torch.manual_seed(2)
        sim = Simulation(wrap(nn.Linear(3, 2)), clients, algorithms.create("fedavg"), fraction=1, rounds=3)
        sim.run(3)
        return sim

    plain = run(lambda model: model)
    scored = run(lambda model: ScoredTask(model, nn.functional.cross_entropy, ("accuracy", "f1")))
    assert torch.equal(plain.flat, scored.flat)
    assert scored.evaluate(clients[0]).items() > plain.evaluate(clients[0]).items()
