"""Configuration of ``fed-compare``: what ``--help`` lists and YAML files set. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polymodal.config import to_dict
from polymodal.errors import UserError

from fedcore.algorithms import ALGORITHMS
from fedcore.compare_grid import Cell, Method, split_grid
from fedcore.data.base import FedData
from fedcore.data.digits import Digits
from fedcore.lora_settings import LoraConfig
from fedcore.privacy_settings import PrivacyConfig
from fedcore.world_settings import ModelConfig, PartitionConfig

__all__ = ["SCHEMA_VERSION", "CompareConfig", "settings_hash"]

SCHEMA_VERSION = 1


@dataclass
class CompareConfig:
    """Algorithms x options x seeds on one data set."""

    name: str = "compare"
    """name of the comparison"""
    algorithms: list[str] = field(default_factory=lambda: ["fedavg", "scaffold", "fedmoswa"])
    """names (see --list-methods), where no methods are given"""
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    """rows by label: {algorithm: NAME (default: the label), option: value or list}; privacy.clip, lora.ranks … too"""
    base: dict[str, Any] = field(default_factory=dict)
    """options of every algorithm, e.g. {weight_decay: 0.001}"""
    rates: list[float] = field(default_factory=list)
    """learning rates of methods without their own (default: each algorithm's)"""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """root seeds: partition, weights, cohorts, orders; the same for every method"""
    pick: Literal["val", "test", "none"] = "val"
    """split on which each method's options are picked (test: with a warning; none: one row a point of the grid)"""
    val_share: float = 0.2
    """share of the training split that no client gets, for picking"""
    screen: int = 0
    """seeds that get the whole grid; the others only the best point and its neighbours (0: all seeds, whole grid)"""
    against: str | None = None
    """method that the paired differences are to (default: the first)"""
    target: float = 0.0
    """test accuracy, 0..1, whose rounds are counted (0: none)"""
    tail: int = 10
    """evaluations at the end whose mean accuracy is compared"""
    landscape: bool = False
    """also measure the final model's largest Hessian eigenvalue and sharpness, on up to 1,000 training samples"""
    rounds: int = 25
    """communication rounds (T)"""
    batch_size: int = 10
    """samples of a local step"""
    local_epochs: int = 5
    """passes of a client over its data in a round (E)"""
    max_steps: int = 0
    """cap of local steps a round (0: none)"""
    exact_steps: bool = False
    """every client takes exactly max_steps steps"""
    fraction: float = 0.1
    """share of clients a round"""
    eval_every: int = 1
    """rounds between evaluations"""
    weighting: Literal["uniform", "samples"] = "uniform"
    """how clients are averaged"""
    engine: Literal["serial", "pool", "batched"] = "serial"
    """how the clients of a cell are computed; jobs use more cores than a pool"""
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    """where to compute"""
    results: Path | None = None
    """folder of the cells, table and curves (default: results/NAME beside the --config file, or runs/fedcore/NAME)"""
    jobs: int = 1
    """cells at a time, one process and one thread each"""
    dry_run: bool = False
    """say which cells would run, run none"""
    data: FedData = field(default_factory=Digits, metadata={"class_typed": True})
    """reader of the data set"""
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", self.name):
            raise UserError(f"name={self.name!r} becomes a folder's name; use letters, digits and _ . + -")
        for name in ("rounds", "batch_size", "local_epochs", "eval_every", "tail", "jobs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}; expected at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds={self.seeds}; expected at least one, none of them twice")
        if not 0 <= self.target <= 1:
            raise UserError(f"target={self.target}; expected 0..1, an accuracy")
        if self.screen < 0:
            raise UserError(f"screen={self.screen}; expected a number of seeds, 0: all of them")
        if not 0 <= self.val_share < 1:
            raise UserError(f"val_share={self.val_share}; expected 0 <= val_share < 1")

    @property
    def screens(self) -> bool:
        """Whether some seeds get a part of the grid."""
        return 0 < self.screen < len(self.seeds) and self.pick != "none"

    def rows(self) -> list[Method]:
        """The methods in table order.

        Raises:
            UserError: unknown algorithm, a rate that is none, a label that is no file name, picking without a
                validation split, or a baseline that is not there.
        """
        given = self.methods or {name: {} for name in self.algorithms}
        if not given:
            raise UserError("no method; give --algorithms or methods")
        found = [self._method(label, dict(options or {})) for label, options in given.items()]
        if self.pick == "val" and self.val_share == 0 and any(len(method.points) > 1 for method in found):
            raise UserError("pick=val with val_share=0; keep a share for validation, or --pick test with its warning")
        if self.against is not None and self.against not in given:
            raise UserError(f"against={self.against}: no such method; methods are {', '.join(given)}")
        return found

    def _method(self, label: str, options: dict[str, Any]) -> Method:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", label):
            raise UserError(f"method {label!r} becomes a file's name; use letters, digits and _ . + -")
        algorithm = str(options.pop("algorithm", label))
        ALGORITHMS.info(algorithm)
        rates = {"lr": self.rates} if self.rates else {}
        return split_grid(label, algorithm, {**self.base, **rates, **options})

    def cells(self) -> Iterator[Cell]:
        """All runs, seed by seed, so that an interrupted comparison has whole seeds first."""
        rows = self.rows()
        for seed in self.seeds:
            for method in rows:
                for point in method.points:
                    yield Cell(method, point, seed)

    def lora_of(self, cell: Cell) -> LoraConfig:
        """Adapters of a cell.

        Raises:
            UserError: a value out of its range.
        """
        return dataclasses.replace(self.lora, **cell.group("lora"))

    def privacy_of(self, cell: Cell) -> PrivacyConfig:
        """The mechanism of a cell.

        Raises:
            UserError: a value out of its range.
        """
        return dataclasses.replace(self.privacy, **cell.group("privacy"))

    def settings(self, cell: Cell, algorithm: Any, fingerprint: str) -> dict[str, Any]:
        """Everything that the result of a cell depends on, as plain data without folders.

        Args:
            cell: the run.
            algorithm: its ``Algorithm``: all options count, defaults included.
            fingerprint: of the data.
        """
        same = ("val_share", "rounds", "batch_size", "local_epochs", "max_steps", "fraction", "eval_every", "weighting")
        partition = {k: v for k, v in to_dict(self.partition).items() if k != "file"}
        if self.partition.file is not None:
            content = self.partition.file.read_bytes() if self.partition.file.is_file() else b""
            partition = {"file": hashlib.sha256(content).hexdigest()[:16]}
        # Serial and pool have the same bits.
        other: dict[str, Any] = {"engine": self.engine} if self.engine == "batched" else {}
        other |= {"device": self.device} if self.device != "cpu" else {}
        other |= {"exact_steps": True} if self.exact_steps else {}
        lora = self.lora_of(cell)
        other |= {"lora": to_dict(lora)} if lora.on else {}
        other |= {"privacy": to_dict(self.privacy_of(cell))} if algorithm.private else {}
        return {
            "schema_version": SCHEMA_VERSION,
            "data": {"name": self.data.name, "fingerprint": fingerprint},
            "partition": partition,
            "model": to_dict(self.model),
            **{name: getattr(self, name) for name in same},
            "landscape": self.landscape,
            "algorithm": cell.method.algorithm,
            "options": to_dict(dataclasses.asdict(algorithm)),
            "seed": cell.seed,
            **other,
        }


def settings_hash(settings: dict[str, Any]) -> str:
    """Hash of a cell's settings: other settings are another cell, which is run again."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
