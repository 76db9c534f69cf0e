"""What a run trains on: clients, validation and test samples, the model they start from, the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from polymodal.errors import UserError
from polymodal.seeding import derive, numpy_rng
from torch import Tensor, nn

from fedcore import partition as schemes
from fedcore.lora.pretrain import set_apart
from fedcore.lora_settings import LoraConfig
from fedcore.models import build
from fedcore.partition import Partition
from fedcore.world_settings import ModelConfig, PartitionConfig

if TYPE_CHECKING:
    from fedcore.data.arrays import ArrayData
    from fedcore.data.base import FedData

__all__ = ["World", "build_world", "cut_validation", "make_model", "make_partition"]


@dataclass(frozen=True)
class World:
    """Everything but the algorithm.

    Args:
        clients: training samples of each client.
        val: validation samples, cut from the training split before it is divided; None where none were asked for.
        test: the test split.
        train: all training samples that are left, unaugmented.
        partition: who has what, indices into the training samples that are left.
        labels: (N,) labels that the partition went by.
        num_classes: outputs of the model.
        loss: mean loss of ``(outputs, targets)``.
        pretrain: samples that no client gets, for a base under adapters; None where none were asked for.
    """

    clients: list[ArrayData]
    val: ArrayData | None
    test: ArrayData
    train: ArrayData
    partition: Partition
    labels: np.ndarray
    num_classes: int
    loss: Callable[[Tensor, Any], Tensor]
    pretrain: ArrayData | None = None


def build_world(
    data: FedData, partition: PartitionConfig, *, val_share: float, seed: int, lora: LoraConfig | None = None
) -> World:
    """Read the data, cut the validation samples, divide the rest over clients.

    Args:
        data: reader.
        partition: how to divide.
        val_share: share of the training split that no client gets, 0 <= share < 1.
        seed: of the partition, where it has none of its own. The validation samples are the same for every seed.
        lora: adapters, whose base may be trained on samples of its own first, the same for every seed.

    Raises:
        UserError: options that do not fit the data.
    """
    if not 0 <= val_share < 1:
        raise UserError(f"val_share={val_share}; expected 0 <= val_share < 1, 0.2 keeps a fifth for validation")
    train, labels = data.load("train"), data.partition_labels("train")
    kept, held = cut_validation(labels, val_share)
    kept, pretrain = (kept, None) if lora is None else set_apart(data, labels, kept, lora)
    rest = train.subset(kept)
    chosen = make_partition(partition, rest, labels[kept], seed, data.fingerprint())
    return World(
        clients=[rest.subset(indices) for indices in chosen],
        val=train.subset(held, augment=False) if len(held) else None,
        test=data.load("test"),
        train=train.subset(kept, augment=False),
        partition=chosen,
        labels=labels[kept],
        num_classes=data.num_classes,
        loss=_squared_error if data.regression else nn.functional.cross_entropy,
        pretrain=pretrain,
    )


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs.squeeze(-1), targets.to(outputs.dtype))


def cut_validation(labels: np.ndarray, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and of validation samples, both rising; the same share of every label, to a sample.

    Args:
        labels: (N,) labels of the training split.
        share: share to hold out, 0 <= share < 1.
        seed: of the choice.
    """
    rng = numpy_rng(seed, "validation")
    held = [
        rng.permutation(m)[: round(share * len(m))] for m in (np.flatnonzero(labels == c) for c in np.unique(labels))
    ]
    out = np.zeros(len(labels), dtype=bool)
    out[np.concatenate(held)] = True
    return np.flatnonzero(~out), np.flatnonzero(out)


def make_partition(
    config: PartitionConfig, train: ArrayData, labels: np.ndarray, seed: int, fingerprint: str | None = None
) -> Partition:
    """Divide ``train`` by the options; a stored partition must be of data with this fingerprint.

    Raises:
        UserError: a stored partition of other data, no column to go by, or options out of range.
    """
    seed = seed if config.seed is None else config.seed
    if config.file is not None:
        return Partition.load(config.file, size=len(train), fingerprint=fingerprint)
    if config.scheme == "dirichlet_client":
        each = config.samples or None
        return schemes.dirichlet_client(labels, config.clients, config.alpha, seed, each, refill=config.refill)
    if config.scheme == "dirichlet_label":
        return schemes.dirichlet_label(labels, config.clients, config.alpha, seed)
    if config.scheme == "shards":
        return schemes.shards(labels, config.clients, config.shards, seed)
    if config.scheme == "iid":
        return schemes.iid(len(labels), config.clients, seed)
    if train.groups is None:
        raise UserError("partition.scheme=column: this data has no natural clients; choose dirichlet_client or another")
    return schemes.by_column(train.groups.numpy(), train.group_names)


def make_model(config: ModelConfig, world: World, *, seed: int, vocabulary: int = 0) -> nn.Module:
    """The model with the weights that belong to ``seed``: the same for every algorithm.

    Args:
        config: name and options.
        world: for the shape of inputs and outputs.
        seed: root seed of the run.
        vocabulary: number of token ids of text data; given to the model unless its options say otherwise.
    """
    options = {"vocabulary": vocabulary, **config.options} if vocabulary else config.options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "model"))
        return build(config.name, num_classes=world.num_classes, input_shape=world.test.input_shape, **options)
