"""Any module over many clients: a TaskModule by its own loss and metrics, a plain LightningModule with a notice."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import lightning as L
import pytest
import torch
from fedcore import federate
from polymodal.task import TaskModule
from torch import nn
from torch.utils.data import ConcatDataset, Dataset


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_federated{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = _load("_toy")


class Segments(TaskModule):
    """A task with batches of its own kind: dictionaries, noise from the generator, a metric that is no accuracy."""

    def __init__(self):
        super().__init__()
        self.net = toy.mlp(classes=2)

    def loss(self, batch, generator):
        noise = torch.randn(batch["x"].shape, generator=generator)
        out = self.net(batch["x"] + 0.1 * noise)
        value = nn.functional.mse_loss(out, batch["y"])
        return value, {"mse": value.detach()}

    def evaluate(self, batch):
        errors = (self.net(batch["x"]) - batch["y"]).abs().mean(dim=1)
        return dict(zip(batch["id"], errors.tolist(), strict=True))

    def metrics(self, records):
        return {"mae": sum(records.values()) / len(records)}

    def batch_size(self, batch):
        return len(batch["x"])

    def configure_optimizers(self):
        raise AssertionError("fedcore brings its own")


class Pairs(Dataset):
    def __init__(self, client, size):
        draw = torch.Generator().manual_seed(client)
        self.x, self.client = torch.randn(size, 6, generator=draw), client
        self.y = self.x[:, :2] * (1 + 0.2 * client)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index], "id": f"{self.client}-{index}"}


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fedsam", "fedacg"])
def test_a_task_module_trains_by_its_own_loss(algorithm):
    torch.manual_seed(0)
    data = [Pairs(i, 8 + i) for i in range(4)]
    sim = federate(Segments(), data, algorithm, batch_size=4, fraction=0.5, engine="serial", seed=3)
    everyone = ConcatDataset(data)
    before = sim.evaluate(everyone)
    history = sim.run(15, val=everyone)
    assert set(before) == {"mae"}
    assert history.last("val/mae") < before["mae"]
    again = federate(Segments(), data, algorithm, batch_size=4, fraction=0.5, engine="serial", seed=3)
    torch.manual_seed(1)  # the draws are the run's, not the process's
    again.flat = sim.learner.start.clone()
    again.server_state = again.algorithm.server_init(again.flat)
    again.run(15)
    assert torch.equal(again.flat, sim.flat)


class Plain(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = toy.mlp()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def test_a_plain_lightning_module_runs_serial_with_a_notice(caplog):
    with caplog.at_level(logging.WARNING, "fedcore"):
        sim = federate(Plain(), toy.clients(), "fedavg", batch_size=4, fraction=1.0)
    assert "its own optimizers" in caplog.text
    first = sim.evaluate(toy.clients()[0])["loss"]
    sim.run(20)
    assert sim.engine == "serial"
    assert sim.evaluate(toy.clients()[0])["loss"] < first


def test_the_plain_modules_steps_are_fedavgs_on_its_loss():
    torch.manual_seed(0)
    module = Plain()
    plain = federate(toy.mlp(), toy.clients(), "fedavg", batch_size=4, fraction=1.0, engine="serial")
    lightning = federate(module, toy.clients(), "fedavg", batch_size=4, fraction=1.0, engine="serial")
    plain.run(3)
    lightning.run(3)
    assert torch.equal(plain.flat, lightning.flat)
