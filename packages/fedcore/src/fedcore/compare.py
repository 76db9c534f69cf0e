"""``fed-compare``: algorithms x options x seeds on one data set, one JSON a cell, one table."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from polymodal.cli import command
from polymodal.pool import in_processes

from fedcore.compare_cell import CellRunner
from fedcore.compare_grid import Cell, CellKey
from fedcore.compare_settings import CompareConfig
from fedcore.data import READERS

__all__ = ["compare", "main"]

PROG = "fed-compare"
EXAMPLE = """
fed-compare                                                  # three methods on digits
fed-compare --algorithms fedavg fedswa --rates 0.1 0.2 --seeds 0 1 2 --jobs 2
fed-compare --config packages/fedcore/experiments/fedswa_e10.yaml
"""
LISTS = ("algorithms", "rates", "seeds")
ALIASES = {"model": "model.name", "clients": "partition.clients", "alpha": "partition.alpha"}
log = logging.getLogger(__name__)


def main() -> int:
    """Entry point; returns the exit code."""
    return command(
        partial(compare, beside=_config_folder(sys.argv[1:])),
        CompareConfig,
        prog=PROG,
        example=EXAMPLE,
        choices={"data": READERS},
        aliases=ALIASES,
        list_methods=_list_methods,
        lists=LISTS,
    )


def _config_folder(argv: Sequence[str]) -> Path | None:
    """Folder of the ``--config`` file, where one is given."""
    for index, argument in enumerate(argv):
        name, eq, value = argument.partition("=")
        if name == "--config":
            path = Path(value if eq else next(iter(argv[index + 1 :]), ""))
            return path.parent if path.is_file() else None
    return None


def _list_methods() -> str:
    from fedcore.algorithms import ALGORITHMS

    width = max(len(info.name) for info in ALGORITHMS)
    return "\n".join(f"{info.name:<{width}}  {info.summary}  [{info.paper}; {info.fidelity}]" for info in ALGORITHMS)


def compare(config: CompareConfig, beside: Path | None = None) -> str:
    """Run the cells that are missing, write and print table and curves.

    Args:
        config: what to compare.
        beside: folder of the configuration file.

    Returns:
        The table.

    Raises:
        UserError: options that do not fit together, or a folder that cannot be written.
    """
    from polymodal.files import check_writable, write_bytes, write_text
    from polymodal.seeding import set_threads

    from fedcore.compare_report import draw_curves, pick_rates, to_table, warning_of
    from fedcore.compare_screen import missing_cells

    config.rows()
    set_threads(1)
    folder = config.results or (beside / "results" if beside else Path("runs/fedcore")) / config.name
    runner = CellRunner(config)
    records: dict[CellKey, dict[str, Any]] = {}
    todo = missing_cells(config, records, partial(runner.read, folder))
    log.info("%d cells in %s, %d of them done before", len(todo) + len(records), folder, len(records))
    if config.dry_run:
        sys.stdout.write("".join(f"would run {cell.name}\n" for cell in todo) or "nothing left to run\n")
        return ""
    check_writable(folder)
    warning = warning_of(config)
    if warning:
        log.warning("%s", warning)
    while todo:
        for cell, record in _run(config, runner, todo):
            _write(folder / f"{cell.name}.json", record)
            records[cell.key] = record
        todo = missing_cells(config, records, partial(runner.read, folder))
    rows = pick_rates(config, records)
    table = to_table(config, rows)
    write_text(folder / "table.md", table)
    if any(row.records for row in rows):
        write_bytes(folder / "curves.png", draw_curves(config, rows))
    sys.stdout.write(f"{table}\ntable, curves and cells: {folder}\n")
    return table


# ------------------------------------------------------------------ running


def _run(config: CompareConfig, runner: CellRunner, todo: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Run cells here or in worker processes, as they finish."""
    began = time.monotonic()
    results: Iterable[tuple[Cell, dict[str, Any]]] = ((cell, runner.run(cell)) for cell in todo)
    if config.jobs > 1 and len(todo) > 1:
        results = in_processes(todo, partial(_runner, config), config.jobs, "cells")
    for done, (cell, record) in enumerate(results, start=1):
        left = (time.monotonic() - began) / done * (len(todo) - done)
        last = record["metrics"].get("test/accuracy")
        state = f"accuracy {last:.4f}" if last is not None else record["error"] or "done"
        seconds = record["seconds"]
        log.info("%d/%d %s: %s (%.1f s; %.0f s left)", done, len(todo), cell.name, state, seconds, left)
        yield cell, record


def _runner(config: CompareConfig) -> Callable[[Cell], dict[str, Any]]:
    """What a worker process does with a cell."""
    return CellRunner(config).run


def _write(path: Path, record: dict[str, Any]) -> None:
    """JSON with one line a column of numbers: results are committed and read in differences."""
    import json

    from polymodal.files import write_text

    rounds = record["rounds"]
    columns = ",\n".join(f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in rounds.items())
    head = json.dumps({key: value for key, value in record.items() if key != "rounds"}, indent=2, ensure_ascii=False)
    write_text(path, f'{head[:-2]},\n  "rounds": {{\n{columns}\n  }}\n}}\n')
