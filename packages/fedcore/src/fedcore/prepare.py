"""From the options of ``fed-train`` to a simulation: data, clients, model, algorithm."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError
from polymodal.seeding import derive
from torch import Tensor, nn

from fedcore.algorithm import Algorithm
from fedcore.algorithms import create
from fedcore.assemble import assemble
from fedcore.imports import call_with, load_object
from fedcore.settings import FedConfig
from fedcore.simulation import Simulation

if TYPE_CHECKING:
    from fedcore.world import World

__all__ = ["Prepared", "make_simulation", "prepare", "trained_module"]

log = logging.getLogger(__name__)


@dataclass
class Prepared:
    """Everything that a run trains on.

    Args:
        model: a module with its first weights, on the run's device.
        clients: one data set a client.
        splits: ``val``, ``test`` and further test splits; None where there is no such split.
        train: training samples of all clients without augmentation, for the landscape; None where they are not known.
        loss: mean loss of ``(outputs, targets)`` for plain models.
        monitor: metric that picks the best model, ``""`` where none is known.
        facts: name, fingerprint, sizes and partition of the data, for the manifest.
        world: clients of a data reader, with their labels.
        scores: what models are reported by, names in ``fedcore.data.metrics``; none: what the module says.
        pretrain: samples that a base under adapters is trained on; None where there are none.
    """

    model: nn.Module
    clients: Sequence[Any]
    splits: dict[str, Any]
    train: Any
    loss: Callable[[Tensor, Any], Tensor]
    monitor: str
    facts: dict[str, Any] = field(default_factory=dict)
    world: World | None = None
    scores: tuple[str, ...] = ()
    pretrain: Any = None

    def task(self, module: nn.Module) -> Any:
        """What is trained: ``module``, with the scores of its data set where they are more than accuracy."""
        from fedcore.scored import ScoredTask

        return ScoredTask(module, self.loss, self.scores) if self.scores not in ((), ("accuracy",)) else module

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def prepare(config: FedConfig, *, pretrain: bool = True) -> Prepared:
    """Read the data, divide it over clients, build the model.

    Args:
        config: of the run.
        pretrain: train the base under adapters, where the options ask for that; False where its weights are loaded.

    Raises:
        UserError: data or options that do not fit.
    """
    device = device_of(config.trainer.accelerator)
    found = _own_datasets(config) if config.datasets else _reader_datasets(config)
    found.model.to(device)
    if pretrain and config.lora.pretrains:
        from fedcore.lora.job import BASE, prepare_base

        stored = _resumed(config, config.resume) / BASE if config.resume else None
        prepare_base(found.model, found.loss, found.pretrain, config.lora, seed=config.seed, stored=stored)
    return found


def _resumed(config: FedConfig, resume: str) -> Path:
    """Folder of the run that goes on."""
    from polymodal.run import find_resume

    return find_resume(resume, "fedcore", config)[0]


def trained_module(config: FedConfig, found: Prepared) -> nn.Module:
    """A module of the layout that the run's checkpoints have: the model, or with adapters the largest."""
    if not config.lora.on:
        return found.model
    from fedcore.lora.job import adapted

    chosen = create(config.algorithm, **config.options_of_algorithm())
    modules, ranks = adapted(found.model, config.lora, chosen, len(found.clients), config.seed)
    return modules(max(ranks))


def device_of(accelerator: str) -> torch.device:
    """The device that Lightning's trainer will choose; the model is put there before its vectors are laid out.

    Raises:
        UserError: an accelerator that is not there.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", 0)
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps", 0)
    if accelerator in ("auto", "cpu"):
        return torch.device("cpu")
    raise UserError(f"--trainer.accelerator {accelerator}: torch finds no such device here; use cpu or auto")


def make_simulation(config: FedConfig, found: Prepared, algorithm: Algorithm | None = None) -> Simulation:
    """The simulation of a run.

    Raises:
        UserError: options out of range, or a model that does not take the data.
    """
    federation = config.federation
    chosen = algorithm or create(config.algorithm, **config.options_of_algorithm())
    return assemble(
        found.model,
        found.task,
        found.clients,
        chosen,
        lora=config.lora,
        privacy=config.privacy_of_algorithm(),
        loss=found.loss,
        batch_size=federation.batch_size,
        local_epochs=federation.local_epochs,
        max_steps=federation.max_steps,
        exact_steps=federation.exact_steps,
        fraction=federation.fraction,
        seed=config.seed,
        rounds=federation.rounds,
        engine=federation.engine,
        workers=federation.workers,
        weighting=federation.weighting,
        state_memory_mib=federation.state_memory_mib,
    )


# ------------------------------------------------------------------ where the data comes from


def _reader_datasets(config: FedConfig) -> Prepared:
    from fedcore.partition_files import checksum
    from fedcore.world import build_world, make_model

    data = config.data
    data.fit_to_model(config.model.name)
    share = config.federation.val_share
    world = build_world(data, config.partition, val_share=share, seed=config.seed, lora=config.lora)
    facts = {
        **data.describe(),
        "clients": len(world.clients),
        "val_samples": 0 if world.val is None else len(world.val),
        "partition": {**world.partition.how, "sha256": checksum(world.partition)},
    }
    offered = {"num_classes": world.num_classes, "input_shape": world.test.input_shape}
    if config.module:
        model = _own_module(config, offered)
    else:
        model = make_model(config.model, world, seed=config.seed, vocabulary=data.vocabulary)
    monitor = "" if config.module or world.val is None else ("val/loss" if data.regression else "val/accuracy")
    if world.val is None and config.federation.val_share:
        log.warning("federation.val_share=%g keeps no sample of any class: no validation", config.federation.val_share)
    splits = {"val": world.val, "test": world.test}
    splits |= {name: data.load(name) for name in data.splits if name not in ("train", *splits)}
    scores = () if config.module else data.metrics
    return Prepared(
        model, world.clients, splits, world.train, world.loss, monitor, facts, world, scores, world.pretrain
    )


def _own_datasets(config: FedConfig) -> Prepared:
    """Clients from the user's function.

    Raises:
        UserError: it does not return a mapping with clients, or there is no module to train on them.
    """
    if not config.module:
        raise UserError("--datasets needs --module: what should be trained on these clients?")
    made = call_with(
        load_object(config.datasets, "datasets"), config.datasets_options, {"seed": config.seed}, "datasets"
    )
    if not isinstance(made, Mapping) or not made.get("clients"):
        raise UserError(
            f"--datasets {config.datasets}: expected a mapping with clients, a list of data sets, and perhaps val and"
            f" test; it returned {type(made).__name__}"
        )
    clients = list(made["clients"])
    sizes = [len(client) for client in clients]
    what = {"datasets": config.datasets, "options": config.datasets_options, "sizes": sizes}
    text = json.dumps(what, sort_keys=True, default=str)
    facts = {
        "name": config.datasets.rpartition(":")[2],
        "fingerprint": str(made.get("fingerprint") or hashlib.sha256(text.encode()).hexdigest()[:16]),
        "clients": len(clients),
    }
    pretrain = made.get("pretrain")
    if config.lora.pretrains and pretrain is None:
        raise UserError(
            f"lora.pretrain_epochs={config.lora.pretrain_epochs}: --datasets {config.datasets} gives no samples for the"
            " base; return {clients: ..., pretrain: ...}, or leave it out"
        )
    splits = {name: made.get(name) for name in ("val", "test")}
    model, loss = _own_module(config, {}), nn.functional.cross_entropy
    return Prepared(model, clients, splits, None, loss, "", facts, pretrain=pretrain)


def _own_module(config: FedConfig, offered: dict[str, Any]) -> nn.Module:
    """The user's module with the weights that belong to the seed.

    Raises:
        UserError: not a torch module.
    """
    made = load_object(config.module, "module")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "model"))
        model = call_with(made, config.module_options, offered, "module")
    if not isinstance(model, nn.Module):
        raise UserError(
            f"--module {config.module}: {type(model).__name__} is no torch module; give a polymodal.TaskModule"
        )
    return model
