"""`polymodal experiments`: a grid of settings and seeds, one process and one JSON file a cell, resumable.

An experiment is a YAML file::

    name: fusion
    command: slt-train            # a console script of this environment
    base: {config: synthetic}     # options of every cell
    cells:                        # options by label
      ssaw: {fusion: ssaw}
      none: {fusion: none}
    seeds: [0, 1, 2]
    metrics: [test/bleu4]
    against: none                 # baseline of the paired differences, optional
    results: results/fusion       # folder of the cells, relative to the file; default: results/<name>
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from polymodal.errors import UserError
from polymodal.files import check_writable, write_json
from polymodal.run_reader import RunRecord, find_runs
from polymodal.tables import Measured, Table, build_table

__all__ = ["Cell", "Experiment", "load_experiment", "run_experiment", "table_of"]

SCHEMA_VERSION = 1
_RUN_KEYS = (
    *("run_id", "method", "fidelity", "config_hash", "started", "ended", "wall_s"),
    *("device", "precision", "threads", "peak_mib", "git"),
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """One setting with one seed.

    Args:
        label: row of the table.
        seed: root seed of the run.
        options: option name (dotted) -> value, as on the command line.
    """

    label: str
    seed: int
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of its file and folder."""
        return f"{self.label}-seed{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """A grid of cells and where their results go; see the module for the YAML form."""

    name: str
    command: tuple[str, ...]
    cells: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    results: Path
    base: Mapping[str, Any] = field(default_factory=dict)
    against: str | None = None
    runs: Path = Path("runs/experiments")

    def grid(self) -> Iterator[Cell]:
        """All cells, seed by seed, so that an interrupted grid has whole seeds first."""
        for seed in self.seeds:
            for label, options in self.cells.items():
                yield Cell(label, seed, {**self.base, **options})

    def settings_hash(self, cell: Cell) -> str:
        """Hash of command and options: a cell whose settings changed is run again."""
        text = json.dumps([list(self.command), dict(cell.options)], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def file(self, cell: Cell) -> Path:
        """JSON file of a cell."""
        return self.results / f"{cell.name}.json"

    def arguments(self, cell: Cell) -> list[str]:
        """Command line of a cell without the output folder, the program by its name."""
        return [*self.command, *(f"--{k}={_argument(v)}" for k, v in cell.options.items()), f"--seed={cell.seed}"]


def _argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def load_experiment(path: Path, runs: Path | None = None) -> Experiment:
    """Read and check an experiment file.

    Args:
        path: YAML file.
        runs: folder for the run folders; default ``runs/experiments``.

    Raises:
        UserError: unreadable file, unknown or missing key, a value of the wrong form.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected name, command, cells, seeds and metrics")
    required = ("name", "command", "cells", "seeds", "metrics")
    unknown = sorted(set(tree) - {*required, "base", "against", "results", "runs"})
    missing = [key for key in required if not tree.get(key)]
    if unknown or missing:
        parts = [f"unknown key {', '.join(unknown)}"] if unknown else []
        parts += [f"missing {', '.join(missing)}"] if missing else []
        raise UserError(f"{path}: {'; '.join(parts)}; keys are {', '.join(required)}, base, against, results, runs")
    _check_forms(path, tree)
    cells = {str(label): dict(options or {}) for label, options in tree["cells"].items()}
    against = tree.get("against")
    if against is not None and str(against) not in cells:
        raise UserError(f"{path}: against: {against} is not a cell; cells are {', '.join(cells)}")
    command = tree["command"]
    return Experiment(
        name=str(tree["name"]),
        command=tuple(command.split() if isinstance(command, str) else map(str, command)),
        cells=cells,
        seeds=tuple(tree["seeds"]),
        metrics=tuple(map(str, tree["metrics"])),
        results=path.parent / str(tree.get("results") or f"results/{tree['name']}"),
        base=dict(tree.get("base") or {}),
        against=None if against is None else str(against),
        runs=runs or Path(str(tree.get("runs") or "runs/experiments")),
    )


def _check_forms(path: Path, tree: Mapping[str, Any]) -> None:
    """Raise UserError for a value that the runner cannot use."""
    cells = tree["cells"]
    if not isinstance(cells, dict) or not all(isinstance(v, dict | None) for v in cells.values()):
        raise UserError(f"{path}: cells: expected label: {{option: value}}")
    for label in (*cells, tree["name"]):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", str(label)):
            raise UserError(f"{path}: {label!r} becomes a file name; use letters, digits and _ . + -")
    seeds = tree["seeds"]
    if not isinstance(seeds, list) or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
        raise UserError(f"{path}: seeds: {seeds}; expected a list of integers")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds: {seeds}; a seed stands there twice")
    if not isinstance(tree["metrics"], list):
        raise UserError(f"{path}: metrics: expected a list of names, e.g. [test/bleu4]")
    for options in (tree.get("base") or {}, *(v or {} for v in cells.values())):
        taken = sorted({"seed", "out", "resume"} & set(options))
        if taken:
            raise UserError(f"{path}: the runner sets {', '.join(taken)} itself; leave it out of base and cells")


# ------------------------------------------------------------------ running


def read_cell(experiment: Experiment, cell: Cell) -> dict[str, Any] | None:
    """The recorded result of a cell with its present settings; ``None`` if it must be run.

    Raises:
        UserError: the file has a newer schema.
    """
    path = experiment.file(cell)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.warning("%s cannot be read and is run again: %s", path, error)
        return None
    version = record.get("schema_version", 0)
    if version > SCHEMA_VERSION:
        raise UserError(f"{path}: schema version {version}; this polymodal reads up to {SCHEMA_VERSION}")
    if record.get("settings_hash") != experiment.settings_hash(cell):
        return None
    return dict(record)


def run_experiment(experiment: Experiment, jobs: int = 1) -> list[dict[str, Any]]:
    """Run every cell that has no finished result; a failing cell is recorded and the others go on.

    Args:
        experiment: what to run.
        jobs: cells at a time.

    Returns:
        The records of all cells in the order of the grid, those of earlier calls included.

    Raises:
        UserError: the command is not installed, or the results folder cannot be written.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs}; expected at least 1")
    program = find_program(experiment.command[0])
    check_writable(experiment.results)
    cells = list(experiment.grid())
    total, stop = len(cells), threading.Event()

    def work(numbered: tuple[int, Cell]) -> dict[str, Any] | None:
        index, cell = numbered
        record = read_cell(experiment, cell)
        if record is not None and record["status"] == "finished":
            _log.info("%d/%d %s: done before", index, total, cell.name)
            return record
        if stop.is_set():
            return None
        started = time.monotonic()
        record = _run_cell(experiment, cell, program, stop)
        if record is not None:
            write_json(experiment.file(cell), record)
            state = record["status"] if record["error"] is None else f"{record['status']}: {record['error']}"
            _log.info("%d/%d %s: %s (%.0f s)", index, total, cell.name, state, time.monotonic() - started)
        return record

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        futures = [pool.submit(work, item) for item in enumerate(cells, start=1)]
        try:
            records = [f.result() for f in futures]
        except BaseException:
            stop.set()
            raise
    return [r for r in records if r is not None]


def find_program(name: str) -> Path:
    """The console script ``name`` beside this interpreter.

    Raises:
        UserError: there is none.
    """
    folder = Path(sys.executable).parent
    for candidate in (folder / name, folder / f"{name}.exe", folder / "Scripts" / f"{name}.exe"):
        if candidate.is_file():
            return candidate
    raise UserError(f"command {name!r} is not in {folder}; install the package that has it")


def _run_cell(experiment: Experiment, cell: Cell, program: Path, stop: threading.Event) -> dict[str, Any] | None:
    """Run one cell's process; ``None`` if it was stopped before its end."""
    folder = experiment.runs / experiment.name / f"{cell.name}-{experiment.settings_hash(cell)}"
    run = _finished_run(folder)
    error = None
    if run is None:
        check_writable(folder)
        command = [str(program), *experiment.arguments(cell)[1:], f"--out={folder}"]
        output = folder / "output.log"
        with output.open("wb") as sink:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
            try:
                code = _wait(process, stop)
            except BaseException:
                _end(process)
                raise
        if code is None:
            return None
        run = _finished_run(folder)
        if code != 0:
            error = f"exit code {code}: {_last_line(output)}"
        elif run is None:
            error = "the command left no finished run folder"
    return _record(experiment, cell, run if error is None else None, error)


def _wait(process: subprocess.Popen[bytes], stop: threading.Event) -> int | None:
    """Exit code; ``None`` if ``stop`` was set and the process was ended."""
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if stop.is_set():
                _end(process)
                return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to save and stop; insist after 30 seconds."""
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _finished_run(folder: Path) -> RunRecord | None:
    """The newest finished run below the cell's folder."""
    if not folder.is_dir():
        return None
    records, _ = find_runs([folder])
    finished = [r for r in records if r.finished]
    return finished[-1] if finished else None


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no output"


def _record(experiment: Experiment, cell: Cell, run: RunRecord | None, error: str | None) -> dict[str, Any]:
    manifest: Mapping[str, Any] = run.manifest if run is not None else {}
    return {
        "schema": "polymodal.experiment",
        "schema_version": SCHEMA_VERSION,
        "experiment": experiment.name,
        "cell": cell.label,
        "seed": cell.seed,
        "status": "finished" if run is not None else "failed",
        "error": error,
        "command": experiment.arguments(cell),
        "settings_hash": experiment.settings_hash(cell),
        "run": {**{key: manifest.get(key) for key in _RUN_KEYS}, "data": _without_paths(manifest.get("data"))},
        "versions": manifest.get("versions", {}),
        "metrics": manifest.get("metrics", {}),
        "metric_signatures": manifest.get("metric_signatures", {}),
    }


def _without_paths(data: Any) -> dict[str, Any]:
    """Facts of the data without the folders of this machine: results are committed."""
    items = data.items() if isinstance(data, Mapping) else ()
    return {k: v for k, v in items if not (isinstance(v, str) and Path(v).is_absolute())}


# ------------------------------------------------------------------ tables


def table_of(experiment: Experiment, against: str | None = None, mix: bool = False) -> Table:
    """Table of the cells that are there; notes name those that are missing or failed.

    Args:
        experiment: whose results are read.
        against: baseline; the file's own by default.
        mix: as in ``build_table``.

    Raises:
        UserError: no finished cell, or results that must not be mixed.
    """
    measured, missing, failed = [], [], []
    for cell in experiment.grid():
        record = read_cell(experiment, cell)
        if record is None:
            missing.append(cell.name)
        elif record["status"] != "finished":
            failed.append(f"{cell.name} ({record['error']})")
        else:
            measured.append(_measured(record, experiment.file(cell)))
    if not measured:
        raise UserError(f"no finished cell in {experiment.results}; run `polymodal experiments run` first")
    order = list(experiment.cells)
    measured.sort(key=lambda m: order.index(m.group))
    notes = [f"not run yet with these settings: {', '.join(missing)}"] if missing else []
    notes += [f"failed: {', '.join(failed)}"] if failed else []
    chosen = against or experiment.against
    table = build_table(
        measured, experiment.metrics, title=experiment.name, by="cell", against=chosen, mix=mix, notes=notes
    )
    absent = [m for m in table.metrics if not any(m in row.summaries for row in table.rows)]
    if absent:
        return dataclasses.replace(table, notes=(*table.notes, f"no cell reports {', '.join(absent)}"))
    return table


def _measured(record: Mapping[str, Any], path: Path) -> Measured:
    run, data = record["run"], record["run"].get("data") or {}
    metrics: Sequence[tuple[str, Any]] = list(record["metrics"].items())
    return Measured(
        group=record["cell"],
        seed=record["seed"],
        metrics={k: float(v) for k, v in metrics if isinstance(v, int | float)},
        fidelity=run.get("fidelity") or "",
        signatures=record["metric_signatures"],
        fingerprint=data.get("fingerprint") or "",
        data=data.get("name") or "",
        config_hash=run.get("config_hash") or "",
        source=str(path),
        started=run.get("started") or "",
    )
