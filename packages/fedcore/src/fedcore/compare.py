"""``fed-compare``: algorithms x options x seeds on one data set, one JSON a cell, one table."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from polymodal.cli import command

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
log = logging.getLogger(__name__)


LISTS = ("--algorithms", "--rates", "--seeds")
ALIASES = {"model": "model.name", "clients": "partition.clients", "alpha": "partition.alpha"}


def main() -> int:
    """Entry point; returns the exit code."""
    argv = _join_lists(sys.argv[1:])
    return command(
        partial(compare, beside=_config_folder(argv)),
        CompareConfig,
        prog=PROG,
        example=EXAMPLE,
        choices={"data": READERS},
        aliases=ALIASES,
        list_methods=_list_methods,
        argv=argv,
    )


def _join_lists(argv: Sequence[str]) -> list[str]:
    """``--seeds 0 1 2``, ``--seeds 0,1,2`` and ``--seeds=[0, 1, 2]`` are the same."""
    joined: list[str] = []
    waiting = list(argv)
    while waiting:
        name, eq, value = waiting.pop(0).partition("=")
        if name not in LISTS:
            joined.append(name + eq + value)
            continue
        words = [value] if eq else []
        while not eq and waiting and not waiting[0].startswith("--"):
            words.append(waiting.pop(0))
        whole = not words or words[0].startswith("[")
        joined.append(f"{name}={' '.join(words)}" if whole else f"{name}=[{', '.join(words)}]")
    return joined


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
    results = _in_processes(config, todo) if config.jobs > 1 and len(todo) > 1 else ((c, runner.run(c)) for c in todo)
    for done, (cell, record) in enumerate(results, start=1):
        left = (time.monotonic() - began) / done * (len(todo) - done)
        last = record["metrics"].get("test/accuracy")
        state = f"accuracy {last:.4f}" if last is not None else record["error"] or "done"
        seconds = record["seconds"]
        log.info("%d/%d %s: %s (%.1f s; %.0f s left)", done, len(todo), cell.name, state, seconds, left)
        yield cell, record


def _in_processes(config: CompareConfig, todo: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    # Fresh processes: a fork of one that has used torch may wait for threads that are not there.
    context = multiprocessing.get_context("spawn")
    workers = min(config.jobs, len(todo))
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(config,)) as pool:
        waiting = {pool.submit(_work, cell): cell for cell in todo}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died (out of memory?); finished cells are kept: run again, with fewer --jobs"
            ) from error
        except BaseException:
            for child in set(multiprocessing.active_children()) - before:
                child.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_worker: list[CellRunner] = []
"""The runner of a worker process."""


def _start_worker(config: CompareConfig) -> None:
    from polymodal.seeding import set_threads

    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its workers
    set_threads(1)
    _worker[:] = [CellRunner(config)]


def _work(cell: Cell) -> dict[str, Any]:
    return _worker[0].run(cell)


def _write(path: Path, record: dict[str, Any]) -> None:
    """JSON with one line a column of numbers: results are committed and read in differences."""
    import json

    from polymodal.files import write_text

    rounds = record["rounds"]
    columns = ",\n".join(f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in rounds.items())
    head = json.dumps({key: value for key, value in record.items() if key != "rounds"}, indent=2, ensure_ascii=False)
    write_text(path, f'{head[:-2]},\n  "rounds": {{\n{columns}\n  }}\n}}\n')
