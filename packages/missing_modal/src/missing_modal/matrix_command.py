"""``mm-matrix``: training pattern x test pattern x rate x seed in one command, as tables, heat map and curves.

Each model of the grid is trained once, in a run folder of its own; its logits under all 2^M - 1 patterns are kept; each
cell is a lookup in them. What is done already is not done again: the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli import Interrupted, command
from polymodal.errors import UserError
from polymodal.pool import in_processes

from missing_modal.data import READERS, spell_manifest
from missing_modal.matrix_settings import LISTS, SCHEMA_VERSION, MatrixConfig, Trial, digest_of
from missing_modal.methods import METHODS
from missing_modal.train import ALIASES, DEFAULT_PRESETS, list_methods

if TYPE_CHECKING:
    from missing_modal.backbones.base import Tower
    from missing_modal.matrix import LogitCache
    from missing_modal.settings import LoaderConfig, MMConfig

__all__ = ["Runner", "main", "matrix"]

PROG = "mm-matrix"
EXAMPLE = """
mm-matrix                                                    # DCP on the world: three trainings, 105 cells of each
mm-matrix --methods dcp mmp_input deep_prompts --seeds 0 1 2 --jobs 2
mm-matrix --data mmimdb --data.root DIR --backbone open_clip:ViT-B-16-quickgelu --backbone.weights FILE
mm-matrix --runs runs/missing_modal/RUN1 runs/missing_modal/RUN2  # models that were trained already
"""
DIGITS = 6
"""of the numbers in a record"""
log = logging.getLogger(__name__)


def main() -> int:
    """Entry point of ``mm-matrix``; returns the exit code."""
    return command(
        matrix,
        MatrixConfig,
        prog=PROG,
        example=EXAMPLE,
        presets="missing_modal",
        choices={"data": READERS},
        default_presets=DEFAULT_PRESETS,
        aliases=ALIASES,
        list_methods=list_methods,
        lists=LISTS,
        argv=spell_manifest(sys.argv[1:]),
    )


def matrix(config: MatrixConfig) -> str:
    """Train and run what is not there yet, write and print tables, heat map and curves.

    Returns:
        The tables.

    Raises:
        UserError: options that do not fit together, bad data, or a folder that cannot be written.
    """
    from polymodal.files import check_writable, write_text
    from polymodal.seeding import set_threads

    from missing_modal.matrix_report import draw, to_tables

    set_threads(config.threads)
    runner = Runner(config)
    todo = runner.todo()
    if config.dry_run:
        found = [f"would train {item.name}" if isinstance(item, Trial) else f"would run {item}" for item in todo]
        sys.stdout.write("\n".join(found or ["nothing left to train"]) + "\n")
        return ""
    check_writable(config.folder)
    log.info("%d models in %s, %d of them done before", len(runner.items), config.folder, len(runner.items) - len(todo))
    try:
        for item, seconds in _run(config, runner, todo):
            log.debug("%s took %.1f s", item, seconds)
    except (Interrupted, KeyboardInterrupt) as stop:
        raise Interrupted("interrupted; the same command goes on where it stopped") from stop
    records = [runner.record(item) for item in runner.items]
    tables = to_tables(config, records)
    write_text(config.folder / "table.md", tables)
    pictures = draw(config, records, config.folder)
    sys.stdout.write(f"{tables}\ntables, cells and logits  {config.folder}\n")
    sys.stdout.write("".join(f"picture                   {path}\n" for path in pictures))
    return tables


class Runner:
    """Trains, runs and looks up the models of one matrix.

    Args:
        config: the matrix.

    Attributes:
        items: its models: trials, or run folders that were given.

    Raises:
        UserError: an unknown method or kind, bad data, or run folders that do not belong together.
    """

    def __init__(self, config: MatrixConfig) -> None:
        self.config = config
        self._towers: dict[str, tuple[Tower, ...]] = {}
        self._given: dict[Path, tuple[Trial, MMConfig]] = {}
        self.described: dict[str, Any] = {}
        if config.runs:
            self.items: list[Trial | Path] = self._read_runs()
        else:
            config.data.check()
            self.described = config.data.describe()
            config.kinds("test")
            self.items = list(config.trials())

    def _read_runs(self) -> list[Trial | Path]:
        """The given run folders, with what they were trained on."""
        from missing_modal.eval_settings import existing, run_config_of

        items: list[Trial | Path] = []
        for given in self.config.runs:
            path = existing(given, "mm-matrix --runs RUN ...")
            run = run_config_of(path)
            if run is None:
                raise UserError(f"--runs {path}: no config.yaml of mm-train there; give run folders")
            described = run.data.describe()
            if not items:
                self.described, self.config.data = described, run.data
            if described.get("fingerprint") != self.described.get("fingerprint"):
                raise UserError(
                    f"--runs {path}: trained on other data than the first run; make a matrix of each data set"
                )
            missing = run.missing
            trial = Trial(run.method, missing.kind, 0.0 if missing.kind == "none" else missing.ratio, run.seed)
            twin = next((other for other, (known, _) in self._given.items() if known == trial), None)
            if twin is not None:
                raise UserError(f"--runs {path}: the same method, pattern and seed as {twin}; give one of the two")
            self._given[path] = (trial, run)
            items.append(path)
        return items

    # ------------------------------------------------------------------ what is there

    def trial(self, item: Trial | Path) -> Trial:
        """What a model was trained on."""
        return item if isinstance(item, Trial) else self._given[item][0]

    def training(self, item: Trial | Path) -> MMConfig:
        """Configuration of a model's run."""
        return self.config.training(item) if isinstance(item, Trial) else self._given[item][1]

    def digest(self, item: Trial | Path) -> str:
        """What the cached logits of a model must belong to."""
        if isinstance(item, Trial):
            return digest_of(self.training(item), self.described)
        from missing_modal.checkpoint import weights_file

        return hashlib.sha256(weights_file(item).read_bytes()).hexdigest()[:16]

    def logits(self, item: Trial | Path) -> Path:
        """File of a model's logits."""
        return self.config.folder / "logits" / f"{self.trial(item).name}-{self.config.split}.npz"

    def cached(self, item: Trial | Path) -> tuple[LogitCache, dict[str, Any]] | None:
        """Logits of a model, where its passes were run with these settings; None where they must be run.

        Raises:
            UserError: a file of a newer version, or a damaged one.
        """
        from missing_modal.matrix import LogitCache

        path = self.logits(item)
        if not path.is_file():
            return None
        cache, meta = LogitCache.load(path)
        fits = meta.get("digest") == self.digest(item) and not cache.missing_passes
        return (cache, meta) if fits else None

    def todo(self) -> list[Trial | Path]:
        """Models whose logits are not there."""
        return [item for item in self.items if self.cached(item) is None]

    # ------------------------------------------------------------------ work

    def work(self, item: Trial | Path) -> float:
        """Train a model unless it was, run its passes, keep the logits; returns the seconds that it took."""
        began = time.monotonic()
        folder = self.train(item) if isinstance(item, Trial) else item
        trained_in = time.monotonic() - began
        self._pass(item, folder, trained_in)
        return time.monotonic() - began

    def train(self, trial: Trial) -> Path:
        """Run folder of a trained model: the one that is there, an interrupted one brought to its end, or a new one."""
        from polymodal.files import write_json
        from polymodal.run import Run

        from missing_modal.job import Job

        config, digest = self.training(trial), self.digest(trial)
        marker = self.config.folder / "models" / f"{trial.name}.json"
        known = _marked(marker, digest)
        if known is not None and known[1] == "finished":
            return known[0]
        if known is not None:
            config = dataclasses.replace(config, resume=str(known[0]))
        job = Job(config)
        self._lend_towers(job)
        job.check()
        info = METHODS.info(trial.method)
        with Run.start(
            "missing_modal", config, name=trial.name, method=info.name, fidelity=info.fidelity, data=job.facts()
        ) as run:
            write_json(marker, {"schema_version": SCHEMA_VERSION, "digest": digest, "run": str(run.folder)})
            with _quiet("missing_modal.job"):  # two lines a model on its small files are too many here
                metrics, _ = job.run(run)
            run.finish(metrics)
        return run.folder

    def _lend_towers(self, job: Any) -> None:
        """The same encoders for all models of this process, where training leaves them as they are."""
        if job.dtype() is not None:
            return  # they are brought to another number format, which has another hash
        key = json.dumps(dataclasses.asdict(job.config.backbone), sort_keys=True, default=str)
        if key not in self._towers:
            self._towers[key] = job.towers
        job.__dict__["towers"] = self._towers[key]

    def _pass(self, item: Trial | Path, folder: Path, trained_in: float) -> None:
        from polymodal.devices import pick_device

        from missing_modal.checkpoint import load_trained
        from missing_modal.passes import run_passes

        config = self.training(item)
        wanted = config.trainer.accelerator
        device = pick_device({"auto": "auto", "cpu": "cpu", "mps": "mps"}.get(wanted, "cuda"))
        trained = load_trained(folder)
        began = time.monotonic()
        cache = run_passes(trained.model, config.data, self.config.split, self._loader(config), device)
        seconds = {"train": round(trained_in, 2), "passes": round(time.monotonic() - began, 3)}
        path = self.logits(item)
        path.parent.mkdir(parents=True, exist_ok=True)
        cache.save(path, {"digest": self.digest(item), "run": str(folder), "seconds": seconds})

    def _loader(self, config: MMConfig) -> LoaderConfig:
        return self.config.loader if self.config.runs else config.loader

    def record(self, item: Trial | Path) -> dict[str, Any]:
        """All cells of a model, looked up in its logits; also written to ``cells/NAME.json``.

        Raises:
            UserError: an unknown kind, or a file of logits that cannot be read.
        """
        from missing_modal.matrix import sweep

        held = self.cached(item)
        assert held is not None  # all models were run
        cache, meta = held
        config, trial = self.config, self.trial(item)
        began = time.monotonic()
        weights = config.missing.weights or None
        kinds = config.kinds("test")
        found = list(
            sweep(
                cache,
                kinds,
                config.tested(),
                config.test_seeds,
                config.data.name,
                config.split,
                weights=weights,
                prefix=f"{config.split}/",
            )
        )
        names = sorted({name for cell in found for name in cell.metrics})
        columns: dict[str, list[Any]] = {
            "kind": [cell.kind for cell in found],
            "ratio": [cell.ratio for cell in found],
            "seed": [cell.seed for cell in found],
        }
        columns |= {name: [_short(cell.metrics.get(name)) for cell in found] for name in names}
        record = {
            "schema": "missing_modal.matrix",
            "schema_version": SCHEMA_VERSION,
            "data": {"name": config.data.name, "fingerprint": self.described.get("fingerprint")},
            "method": trial.method,
            "fidelity": METHODS.info(trial.method).fidelity,
            "train": {"kind": trial.kind, "ratio": trial.ratio, "seed": trial.seed},
            "split": config.split,
            "samples": len(cache),
            "digest": meta["digest"],
            "run": meta["run"],
            "seconds": {**meta["seconds"], "lookups": round(time.monotonic() - began, 3)},
            "cells": columns,
        }
        _write(config.folder / "cells" / f"{trial.name}.json", record)
        return record


def _short(value: float | None) -> float | None:
    """A number of a record; what is not defined for a cell is null."""
    return None if value is None or value != value else round(value, DIGITS)


def _marked(marker: Path, digest: str) -> tuple[Path, str] | None:
    """Run folder of a model and its status, where one with these settings was begun."""
    from polymodal.run import read_manifest

    try:
        stored = json.loads(marker.read_text(encoding="utf-8"))
        folder = Path(stored["run"])
        if stored["digest"] != digest:
            return None
        return folder, str(read_manifest(folder)["status"])
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None  # not begun, or its folder is gone


def _write(path: Path, record: dict[str, Any]) -> None:
    """JSON with one line a column of numbers: results are committed and read in differences."""
    from polymodal.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ",\n".join(f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in record["cells"].items())
    head = json.dumps({key: value for key, value in record.items() if key != "cells"}, indent=2, ensure_ascii=False)
    write_text(path, f'{head[:-2]},\n  "cells": {{\n{columns}\n  }}\n}}\n')


# ------------------------------------------------------------------ running


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Warnings only from a logger, meanwhile."""
    talker = logging.getLogger(name)
    before = talker.level
    talker.setLevel(logging.WARNING)
    try:
        yield
    finally:
        talker.setLevel(before)


def _run(config: MatrixConfig, runner: Runner, todo: Sequence[Trial | Path]) -> Iterator[tuple[Trial | Path, float]]:
    """Models here or in worker processes, as they finish."""
    began = time.monotonic()
    results: Iterable[tuple[Trial | Path, float]] = ((item, runner.work(item)) for item in todo)
    if config.jobs > 1 and len(todo) > 1:
        results = in_processes(todo, partial(_worker, config), config.jobs, "models")
    for done, (item, seconds) in enumerate(results, start=1):
        left = (time.monotonic() - began) / done * (len(todo) - done)
        log.info("%d/%d %s (%.1f s; %.0f s left)", done, len(todo), runner.trial(item).name, seconds, left)
        yield item, seconds


def _worker(config: MatrixConfig) -> Callable[[Trial | Path], float]:
    """What a worker process does with a model."""
    return Runner(config).work
