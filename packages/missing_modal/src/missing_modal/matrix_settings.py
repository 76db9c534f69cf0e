"""Configuration of ``mm-matrix``: what ``--help`` lists and YAML presets set. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polymodal.config import to_dict
from polymodal.errors import UserError, did_you_mean

from missing_modal.methods import METHODS
from missing_modal.settings import MMConfig
from missing_modal.tables import canonical_kind

__all__ = ["LISTS", "SCHEMA_VERSION", "MatrixConfig", "Trial", "digest_of"]

SCHEMA_VERSION = 1
LISTS = ("methods", "train_kinds", "train_ratios", "test_kinds", "test_ratios", "seeds", "test_seeds", "runs")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Trial:
    """One model of the grid.

    Args:
        method: registered name.
        kind: what goes missing in training.
        ratio: share of the training rows that lack something.
        seed: of training and of its missing tables.
    """

    method: str
    kind: str
    ratio: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return _UNSAFE.sub("_", f"{self.method}-{self.kind}-{self.ratio:g}-seed{self.seed}")


@dataclass
class MatrixConfig(MMConfig):
    """Training pattern x test pattern x rate x seed: each model is trained once, each cell is a lookup."""

    methods: list[str] = field(default_factory=list)
    """rows, see --list-methods (default: method)"""
    train_kinds: list[str] = field(default_factory=list)
    """what goes missing in training (default: image, text, both; any and only:NAME of each beyond two modalities)"""
    train_ratios: list[float] = field(default_factory=list)
    """shares of the training rows that lack something (default: missing.ratio)"""
    test_kinds: list[str] = field(default_factory=list)
    """what goes missing in the test (default: as train_kinds)"""
    test_ratios: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    """shares of the test rows that lack something"""
    seeds: list[int] = field(default_factory=lambda: [0])
    """root seeds of the trainings and of their missing tables"""
    test_seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """seeds of the test tables, over which a model's score is averaged"""
    split: Literal["test", "val"] = "test"
    """part of the data that is scored"""
    metric: str | None = None
    """score of tables and pictures (default: the data's)"""
    at: float | None = None
    """test rate of the table and the heat map (default: the first of train_ratios)"""
    against: str | None = None
    """method that the paired differences are to (default: the first)"""
    runs: list[Path] = field(default_factory=list)
    """run folders of mm-train that are scored in place of models trained here"""
    results: Path | None = None
    """folder of models, logits, cells, table and pictures (default: OUT/missing_modal/NAME)"""
    jobs: int = 1
    """models at a time, one process and one thread each"""

    def __post_init__(self) -> None:
        for name in ("seeds", "test_seeds", "test_ratios"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name}={values}; expected at least one, none of them twice")
        for name in ("train_ratios", "test_ratios"):
            if any(not 0 <= value <= 1 for value in getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)}; expected shares from 0 to 1")
        if self.at is not None and not 0 <= self.at <= 1:
            raise UserError(f"at={self.at}; expected a share from 0 to 1")
        if min(self.test_seeds) < 0 or min(self.seeds) < 0:
            raise UserError("seeds below 0; expected 0 or more")
        if self.jobs < 1:
            raise UserError(f"jobs={self.jobs}; expected at least 1")
        if self.missing.tables is not None:
            raise UserError("missing.tables: mm-matrix draws its tables; leave the folder out")
        if self.resume:
            raise UserError(
                "mm-matrix goes on by itself where it stopped; leave --resume out and give the same command"
            )

    # ------------------------------------------------------------------ the grid

    def rows(self) -> list[str]:
        """Methods in the order of the table.

        Raises:
            UserError: unknown, twice, or a baseline that is not among them.
        """
        found = list(self.methods or [self.method])
        for name in found:
            METHODS.info(name)
        if len(set(found)) < len(found):
            raise UserError(f"methods={found}; none of them twice")
        if self.against is not None and self.against not in found:
            raise UserError(
                f"against={self.against}: {did_you_mean(self.against, found)}methods are {', '.join(found)}"
            )
        return found

    def kinds(self, which: Literal["train", "test"]) -> list[str]:
        """Kinds in their one spelling.

        Raises:
            UserError: unknown with these modalities, or twice.
        """
        names = tuple(self.data.modalities)
        default = ["image", "text", "both"] if names == ("image", "text") else ["any", *(f"only:{n}" for n in names)]
        given = (self.test_kinds or self.train_kinds) if which == "test" else self.train_kinds
        found = [canonical_kind(kind, names) for kind in given or default]
        if len(set(found)) < len(found):
            raise UserError(f"{which}_kinds={given}; none of them twice")
        return found

    def ratios(self) -> list[float]:
        """Shares of the training rows that lack something."""
        return list(dict.fromkeys(self.train_ratios)) or [self.missing.ratio]

    @property
    def shown_at(self) -> float:
        """The test rate of table and heat map."""
        return self.ratios()[0] if self.at is None else self.at

    def tested(self) -> list[float]:
        """Test rates, rising, with that of the table."""
        return sorted({*self.test_ratios, self.shown_at})

    def trials(self) -> list[Trial]:
        """All models, seed by seed, so that an interrupted matrix has whole seeds first."""
        return [
            Trial(method, kind, ratio, seed)
            for seed in self.seeds
            for method in self.rows()
            for kind in self.kinds("train")
            for ratio in (self.ratios() if kind != "none" else [0.0])
        ]

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        if self.results is not None:
            return self.results.expanduser()
        return self.out.expanduser() / "missing_modal" / _UNSAFE.sub("-", self.name or "matrix")

    def training(self, trial: Trial) -> MMConfig:
        """Configuration of a model's run; its folder lies in ``models``.

        The validation split lacks what the training split lacks. W&B is off unless it was asked for by name.
        """
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(MMConfig)}
        missing = dataclasses.replace(
            self.missing,
            kind=trial.kind,
            ratio=trial.ratio,
            seed=trial.seed,
            test_kind="",
            test_ratio=None,
            tables=None,
        )
        log = dataclasses.replace(self.log, wandb="off") if self.log.wandb == "auto" else self.log
        values |= {
            "method": trial.method,
            "method_options": self.method_options if trial.method == self.method else {},
            "missing": missing,
            "seed": trial.seed,
            "out": self.folder / "models",
            "name": trial.name,
            "log": log,
            "dry_run": False,
        }
        return MMConfig(**values)


def digest_of(config: MMConfig, described: dict[str, Any]) -> str:
    """Hash of what a model depends on: other settings or data are another model, which is trained anew.

    Args:
        config: of the run.
        described: what the reader says about the data; its fingerprint counts, folders do not.
    """
    plain = to_dict(config)
    for key in ("out", "name", "resume", "threads", "dry_run", "log", "data"):
        plain.pop(key, None)
    plain["trainer"].pop("progress", None)
    plain["loader"].pop("num_workers", None)
    options = to_dict(config.data)
    options.pop("root", None)
    plain["data"] = [config.data.name, described.get("fingerprint"), options]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]
