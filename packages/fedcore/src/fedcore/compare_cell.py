"""One cell of a comparison: an in-process simulation, and the record it leaves."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import platform
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.config import to_dict
from polymodal.errors import UserError

from fedcore.algorithms import ALGORITHMS, create
from fedcore.compare_grid import Cell
from fedcore.compare_settings import SCHEMA_VERSION, CompareConfig, settings_hash
from fedcore.lora_settings import LoraConfig
from fedcore.privacy_settings import PrivacyConfig
from fedcore.world_settings import PartitionConfig

if TYPE_CHECKING:
    from torch import nn

    from fedcore.data.arrays import ArrayData
    from fedcore.simulation import Simulation
    from fedcore.world import World

__all__ = ["CellRunner", "curve"]

LANDSCAPE_SAMPLES = 1000
"""training samples of which the landscape is measured, at most"""
DIGITS = 5
"""significant digits of the numbers by round"""
log = logging.getLogger(__name__)


class CellRunner:
    """Runs cells of one comparison; keeps the data, and the world of the last seed.

    Args:
        config: the comparison.

    Raises:
        UserError: a device that is not there.
    """

    def __init__(self, config: CompareConfig) -> None:
        _check_device(config.device)
        self.config = config
        self.fingerprint: str = config.data.fingerprint()
        self._world: tuple[Any, World] | None = None
        self._base: tuple[Any, nn.Module] | None = None

    def settings(self, cell: Cell) -> dict[str, Any]:
        """What the cell's result depends on.

        Raises:
            UserError: an option that the algorithm does not have, or a value out of its range.
        """
        return self.config.settings(cell, create(cell.method.algorithm, **cell.options), self.fingerprint)

    def read(self, folder: Path, cell: Cell) -> dict[str, Any] | None:
        """The record of a cell that was run with these settings; None where the cell must be run.

        Raises:
            UserError: as ``settings``, or a record of a newer version.
        """
        settings, record = self.settings(cell), _read(folder / f"{cell.name}.json")
        if record is None:
            return None
        defaults = {
            "options": to_dict(dataclasses.asdict(create(cell.method.algorithm))),
            "partition": to_dict(PartitionConfig()),
            "lora": to_dict(LoraConfig()),
            "privacy": to_dict(PrivacyConfig()),
        }
        reduced = _without_new(settings, record.get("settings"), defaults)
        return record if record.get("settings_hash") == settings_hash(reduced) else None

    def world(self, cell: Cell) -> World:
        """Clients and splits of a cell: those of its seed, without the samples that the base was trained on."""
        from fedcore.world import build_world

        lora = self.config.lora_of(cell)
        key = (cell.seed, _base_of(lora))
        if self._world is None or self._world[0] != key:
            config = self.config
            found = build_world(config.data, config.partition, val_share=config.val_share, seed=cell.seed, lora=lora)
            self._world = (key, found)
        return self._world[1]

    def model(self, cell: Cell) -> nn.Module:
        """A model with its first weights; with adapters, the base, which is trained once a seed."""
        from fedcore.world import make_model

        lora, world = self.config.lora_of(cell), self.world(cell)
        key = (cell.seed, _base_of(lora))
        if self._base is None or self._base[0] != key:
            made = make_model(self.config.model, world, seed=cell.seed, vocabulary=self.config.data.vocabulary)
            if world.pretrain is not None:
                from fedcore.lora.job import prepare_base

                prepare_base(made, world.loss, world.pretrain, lora, seed=cell.seed)
            self._base = (key, made)
        return copy.deepcopy(self._base[1])

    def run(self, cell: Cell) -> dict[str, Any]:
        """The cell's record. A run whose parameters stop being finite is a result too: status ``diverged``."""
        from fedcore.simulation import RoundError

        settings, began = self.settings(cell), time.monotonic()
        record: dict[str, Any] = {
            "schema": "fedcore.compare",
            "schema_version": SCHEMA_VERSION,
            "comparison": self.config.name,
            "method": cell.method.label,
            "algorithm": cell.method.algorithm,
            "fidelity": ALGORITHMS.info(cell.method.algorithm).fidelity,
            "rate": settings["options"]["lr"],
            "seed": cell.seed,
            "settings_hash": settings_hash(settings),
            "settings": settings,
            "versions": _versions(),
        }
        simulation = self._simulation(cell)
        rows: list[dict[str, Any]] = []
        world = self.world(cell)
        error = None
        try:
            simulation.run(
                self.config.rounds,
                test=world.test,
                val=world.val,
                eval_every=self.config.eval_every,
                on_round=rows.append,
            )
        except RoundError as problem:
            error = str(problem)
        finally:
            simulation.close()
        metrics = {} if error or not rows else _final(rows)
        if self.config.landscape and error is None:
            metrics |= self._landscape(simulation, world)
        return record | {
            "status": "finished" if error is None else "diverged",
            "error": error,
            "parameters": simulation.flat.numel(),
            "samples_by_client": {"least": min(world.partition.sizes), "most": max(world.partition.sizes)},
            "seconds": round(time.monotonic() - began, 3),
            "metrics": metrics,
            **_promise(simulation),
            "rounds": _columns(rows),
        }

    def _simulation(self, cell: Cell) -> Simulation:
        from fedcore.assemble import assemble

        config, world = self.config, self.world(cell)
        return assemble(
            self.model(cell).to(config.device),
            lambda module: module,
            _stored(world.clients),
            create(cell.method.algorithm, **cell.options),
            lora=config.lora_of(cell),
            privacy=config.privacy_of(cell),
            exact_steps=config.exact_steps,
            loss=world.loss,
            batch_size=config.batch_size,
            local_epochs=config.local_epochs,
            max_steps=config.max_steps,
            fraction=config.fraction,
            seed=cell.seed,
            rounds=config.rounds,
            engine=config.engine,
            weighting=config.weighting,
        )

    def _landscape(self, simulation: Simulation, world: World) -> dict[str, float]:
        from polymodal.seeding import numpy_rng

        from fedcore.landscape import DatasetLoss, hessian_eigenvalue, sharpness

        order = numpy_rng(0, "landscape").permutation(len(world.train))[:LANDSCAPE_SAMPLES]
        loss = DatasetLoss(simulation.model, world.train.subset(sorted(order)), world.loss)
        found = hessian_eigenvalue(loss, loss.flat, tolerance=1e-2)
        rise = sharpness(loss, loss.flat, loss.spec)
        return {
            "landscape/hessian": found.value,
            "landscape/hessian_residual": found.residual,
            "landscape/sharpness": rise.mean,
        }


def _base_of(lora: LoraConfig) -> str:
    """What the base of an adapted model depends on."""
    return json.dumps({k: v for k, v in to_dict(lora).items() if k.startswith("pretrain_")}, sort_keys=True)


def _stored(clients: Sequence[ArrayData]) -> Sequence[Any]:
    """Clients as rows of shared tensors, which the batched engine gathers at once; as they are where none is stored."""
    import torch
    from torch.utils.data import Subset, TensorDataset

    tensors = clients[0].tensors
    if tensors is None or any(client.tensors is None or client.tensors[0] is not tensors[0] for client in clients):
        return clients
    whole = TensorDataset(*tensors)
    return [Subset(whole, client.rows(torch.arange(len(client))).tolist()) for client in clients]


def _promise(simulation: Simulation) -> dict[str, Any]:
    """The privacy report of a private run."""
    from fedcore.privacy.simulation import PrivateSimulation

    return {"privacy": simulation.report().to_dict()} if isinstance(simulation, PrivateSimulation) else {}


def _check_device(name: str) -> None:
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[name]:
        raise UserError(f"device={name}: torch finds no such device here; use cpu")


def _final(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of the last round, and bytes of the whole run."""
    last = {name: float(value) for name, value in rows[-1].items() if name.partition("/")[0] in ("val", "test")}
    counted = [name for name in ("comm/up_bytes", "comm/down_bytes") if all(name in row for row in rows)]
    total = {f"{name}_total": float(sum(row[name] for row in rows)) for name in counted}
    return last | total


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of rounds as columns; one value where all rounds have the same, as most have of clients and bytes.

    None where a round was not evaluated or a value is not finite.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [_short(row.get(name)) for row in rows] for name in names}
    return {name: values[0] if len(set(values)) == 1 else values for name, values in columns.items()}


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _versions() -> dict[str, str]:
    names = ("polymodal-fedcore", "torch", "numpy", "scikit-learn")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def _read(path: Path) -> dict[str, Any] | None:
    """A record; None where there is none, or none that can be read.

    Raises:
        UserError: written by a newer version.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read and is run again: %s", path, error)
        return None
    if not isinstance(record, dict):
        return None
    if record.get("schema_version", 0) > SCHEMA_VERSION:
        raise UserError(f"{path}: schema version {record['schema_version']}; this fedcore reads {SCHEMA_VERSION}")
    return record


def _without_new(settings: dict[str, Any], recorded: Any, defaults: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``settings`` without options that a record does not know and that have their defaults.

    Such options came after the record; at their defaults, methods do what they did before.
    """
    reduced = dict(settings)
    for group, default in defaults.items():
        if group not in settings:
            continue
        old = recorded.get(group, {}) if isinstance(recorded, dict) else {}
        reduced[group] = {k: v for k, v in settings[group].items() if k in old or k not in default or v != default[k]}
    return reduced


def curve(record: Mapping[str, Any], metric: str) -> list[tuple[int, float]]:
    """(rounds done, value) of the rounds of a record that have the metric."""
    rounds, values = (record["rounds"].get(name) for name in ("round", metric))
    rounds = rounds if isinstance(rounds, list) else [rounds]
    values = values if isinstance(values, list) else [values] * len(rounds)
    return [(int(r), float(v)) for r, v in zip(rounds, values, strict=True) if r is not None and v is not None]
