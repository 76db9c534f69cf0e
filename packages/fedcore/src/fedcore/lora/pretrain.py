"""A base for adapters: a model trained on samples that no client gets, with a head that has seen none of them."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from polymodal.errors import UserError
from polymodal.seeding import derive, generator, numpy_rng, seed_global

from fedcore.batches import ClientData
from fedcore.lora_settings import LoraConfig
from fedcore.tasks import Task

if TYPE_CHECKING:
    from fedcore.data.arrays import ArrayData
    from fedcore.data.base import FedData

__all__ = ["pretrain", "set_apart"]

log = logging.getLogger(__name__)


def set_apart(
    data: FedData, labels: np.ndarray, kept: np.ndarray, config: LoraConfig
) -> tuple[np.ndarray, ArrayData | None]:
    """Training samples that are left for clients, and those that the base is trained on.

    The choice is the same for every seed of a run, so that clients of different seeds divide the same samples.

    Args:
        data: reader of the clients' samples.
        labels: (N,) labels of its training split.
        kept: indices of training samples that are no validation samples, rising.
        config: share and labels; ``pretrain_data`` are options in which the reader of the base's samples differs.

    Returns:
        Indices, rising; samples, or None where the base is not trained.

    Raises:
        UserError: no sample has such a label, or the other reader has other samples.
    """
    if not config.pretrains:
        return kept, None
    wanted = np.unique(labels[kept]) if not config.pretrain_labels else np.asarray(config.pretrain_labels)
    rng = numpy_rng(0, "pretrain")
    chosen = []
    for label in wanted:
        members = kept[labels[kept] == label]
        if not len(members):
            raise UserError(f"lora.pretrain_labels: no training sample has label {label}; leave it out")
        chosen.append(rng.permutation(members)[: round(config.pretrain_share * len(members))])
    given = np.sort(np.concatenate(chosen))
    if not len(given):
        raise UserError(f"lora.pretrain_share={config.pretrain_share} leaves no sample to train the base on; raise it")
    return np.setdiff1d(kept, given), _reader(data, config, labels).load("train").subset(given)


def _reader(data: FedData, config: LoraConfig, labels: np.ndarray) -> FedData:
    """The reader of the base's samples.

    Raises:
        UserError: an option that it does not have, or other samples.
    """
    if not config.pretrain_data:
        return data
    known = [item.name for item in dataclasses.fields(data) if item.init]
    for name in config.pretrain_data:
        if name not in known:
            raise UserError(f"lora.pretrain_data: {data.name} has no option {name!r}; known: {', '.join(known)}")
    other = dataclasses.replace(data, **config.pretrain_data)
    if not np.array_equal(other.partition_labels("train"), labels):
        raise UserError("lora.pretrain_data: with these options the training split has other samples; leave them out")
    return other


def pretrain(task: Task, samples: Any, config: LoraConfig, head: Sequence[str], *, seed: int) -> float:
    """Train all weights of a model by AdamW, then put the head back to where it was.

    Draws depend on the seed alone. The model is changed in place.

    Args:
        task: the model with its loss.
        samples: a dataset, see ``ClientData``.
        config: epochs, rate, batch size.
        head: names of the parameters that become new again.
        seed: root seed of the run.

    Returns:
        Mean loss of the last epoch.

    Raises:
        UserError: the loss is not finite.
    """
    module, data = task.module, ClientData(samples)
    fresh = {name: module.get_parameter(name).detach().clone() for name in head}
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.pretrain_lr, weight_decay=0.0)
    device, loss = parameters[0].device, math.nan
    module.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for epoch in range(config.pretrain_epochs):
            order = torch.randperm(len(data), generator=generator(seed, "pretrain", epoch))
            total = 0.0
            for step, indices in enumerate(torch.split(order, config.pretrain_batch_size)):
                rng = derive(seed, "pretrain", epoch, step)
                batch = _on(data.batch(indices, generator(rng, "augment") if data.augments else None), device)
                seed_global(rng)
                value = task.loss(batch, rng)
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]  # torch's own
                optimizer.step()
                total += float(value.detach()) * len(indices)
            loss = total / len(data)
            if not math.isfinite(loss):
                raise UserError(f"the base's loss is {loss} in epoch {epoch + 1}; lower lora.pretrain_lr")
    module.zero_grad()
    with torch.no_grad():
        for name, value in fresh.items():
            module.get_parameter(name).copy_(value)
    log.info("base: %d epochs on %d samples, loss %.3f; its head is new", config.pretrain_epochs, len(data), loss)
    return loss


def _on(batch: Any, device: torch.device) -> Any:
    if device.type == "cpu":
        return batch
    from lightning.fabric.utilities import move_data_to_device

    return move_data_to_device(batch, device)
