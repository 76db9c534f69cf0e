"""Which cells of a comparison are run next: all of them, or, with ``screen``, the whole grid on a few seeds first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedcore.compare_grid import Cell, CellKey, Method, Point
from fedcore.compare_report import Records, accuracy_of
from fedcore.compare_settings import CompareConfig

__all__ = ["missing_cells", "next_cells"]


def missing_cells(
    config: CompareConfig, records: dict[CellKey, Any], read: Callable[[Cell], Mapping[str, Any] | None]
) -> list[Cell]:
    """Cells to run next, after all that are wanted and were run before have been read.

    Args:
        config: the comparison.
        records: what is known; what is read is added.
        read: record of a cell that was run; None where there is none.
    """
    lacking: set[CellKey] = set()
    while True:
        wanted = next_cells(config, records)
        unread = [cell for cell in wanted if cell.key not in lacking]
        if not unread:
            return wanted
        for cell in unread:
            record = read(cell)
            if record is None:
                lacking.add(cell.key)
            else:
                records[cell.key] = record


def next_cells(config: CompareConfig, records: Records) -> list[Cell]:
    """Cells that are wanted by what is known so far, and are not there; none: the comparison is complete.

    With ``screen`` the first seeds have the whole grid. Then the best point of a method, and the points one step from
    it in one option, get all seeds, until the best of those that have all seeds has only neighbours that have, too.

    Args:
        config: the comparison.
        records: of the cells that were run.
    """
    if not config.screens:
        return [cell for cell in config.cells() if cell.key not in records]
    first = config.seeds[: config.screen]
    found: dict[tuple[str, Point, int], Cell] = {}
    for method in config.rows():
        todo = [Cell(method, point, seed) for point in method.points for seed in first]
        if all(cell.key in records for cell in todo):
            todo = [
                Cell(method, point, seed) for point in _around_best(config, method, records) for seed in config.seeds
            ]
        found |= {cell.key: cell for cell in todo if cell.key not in records}
    return sorted(found.values(), key=lambda cell: config.seeds.index(cell.seed))  # whole seeds first


def _around_best(config: CompareConfig, method: Method, records: Records) -> list[Point]:
    """The best point and its neighbours; none where every point has diverged."""
    seeds = config.seeds
    whole = _scores(config, method, records, seeds)
    screened = _scores(config, method, records, seeds[: config.screen])
    scores: Mapping[Point, float] = whole or screened
    if not scores:
        return []
    best = max(scores, key=lambda point: scores[point])
    return [best, *_neighbours(method, best)]


def _scores(config: CompareConfig, method: Method, records: Records, seeds: list[int]) -> dict[Point, float]:
    """Mean accuracy of the points that have all these seeds, and have diverged in none."""
    found = {}
    for point in method.points:
        runs = {seed: records[method.label, point, seed] for seed in seeds if (method.label, point, seed) in records}
        if len(runs) == len(seeds) and all(record["status"] == "finished" for record in runs.values()):
            found[point] = accuracy_of(config, runs)
    return found


def _neighbours(method: Method, point: Point) -> Iterator[Point]:
    """One step up or down in one option; numbers by size, other values in the order they were given."""
    for index, (name, value) in enumerate(point):
        given = method.grid[name]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in given)
        values = sorted(given) if numbers else list(given)
        at = values.index(value)
        for other in values[max(at - 1, 0) : at + 2]:
            if other != value:
                yield (*point[:index], (name, other), *point[index + 1 :])
