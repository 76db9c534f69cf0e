"""From the records of a comparison to picked rates, one Markdown table and the curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polymodal.stats import paired_difference, summarise
from polymodal.tables import markdown

from fedcore.compare_cell import LANDSCAPE_SAMPLES, curve
from fedcore.compare_settings import CellKey, CompareConfig, Method

__all__ = ["Picked", "draw_curves", "pick_rates", "tail_mean", "to_table", "warning_of"]

Records = Mapping[CellKey, Mapping[str, Any]]
MIB = 2.0**20


@dataclass(frozen=True)
class Picked:
    """One row of the table.

    Args:
        label: name of the row.
        rate: the rate that was picked; the algorithm's own where no rate was given.
        of: number of rates in the grid.
        at_edge: whether the rate is the lowest or highest of a grid of several.
        diverged: rates of the grid with a seed that diverged.
        records: by seed; empty where all rates diverged.
    """

    label: str
    rate: float | None
    of: int
    at_edge: bool
    diverged: tuple[float | None, ...]
    records: Mapping[int, Mapping[str, Any]]


def tail_mean(record: Mapping[str, Any], metric: str, count: int) -> float | None:
    """Mean of the last ``count`` values of a metric; None where it was never measured."""
    values = [value for _, value in curve(record, metric)][-count:]
    return sum(values) / len(values) if values else None


def pick_rates(config: CompareConfig, records: Records) -> list[Picked]:
    """For each method the rate whose mean over seeds, of the mean accuracy of the last evaluations, is largest.

    A rate with a diverged seed is out. With ``pick=none`` each rate is a row of its own.
    """
    rows = []
    for method in config.rows():
        rates: tuple[float | None, ...] = method.rates or (None,)
        if config.pick == "none":
            rows += [
                _picked(config, method, (rate,), records, f"{method.label} {rate:g}" if rate else method.label)
                for rate in rates
            ]
        else:
            rows.append(_picked(config, method, rates, records, method.label))
    return rows


def _picked(
    config: CompareConfig, method: Method, rates: Sequence[float | None], records: Records, label: str
) -> Picked:
    by_rate = {rate: {seed: records[method.label, rate, seed] for seed in config.seeds} for rate in rates}
    good = {rate: found for rate, found in by_rate.items() if all(r["status"] == "finished" for r in found.values())}
    diverged = tuple(rate for rate in rates if rate not in good)
    if not good:
        return Picked(label, None, len(rates), False, diverged, {})
    split = "test" if config.pick == "test" else "val"

    def score(rate: float | None) -> float:
        values = [tail_mean(record, f"{split}/accuracy", config.tail) for record in good[rate].values()]
        return sum(v for v in values if v is not None) / max(len(values), 1)

    rate = max(good, key=score)
    edge = len(rates) > 1 and rate in (min(r for r in rates if r is not None), max(r for r in rates if r is not None))
    shown = next(iter(good[rate].values()))["rate"]
    return Picked(label, shown, len(rates), edge, diverged, good[rate])


# ------------------------------------------------------------------ table


def warning_of(config: CompareConfig) -> str:
    """One line where rates were picked on the test samples; empty otherwise."""
    if config.pick != "test" or all(len(method.rates) < 2 for method in config.rows()):
        return ""
    return "WARNING: rates were picked on the test samples; these accuracies are too good. Use --pick val for results."


def to_table(config: CompareConfig, rows: Sequence[Picked]) -> str:
    """Heading, table and notes as Markdown."""
    tail = min(config.tail, -(-config.rounds // config.eval_every))
    baseline = next((row for row in rows if _is(row, config.against or rows[0].label)), rows[0])
    columns: list[tuple[str, Callable[[Picked], str]]] = [
        ("method", lambda row: row.label),
        ("rate", lambda row: "–" if row.rate is None else f"{row.rate:g}"),
        (f"test accuracy, last {tail} (%)", lambda row: _summary(_tails(config, row, "test"))),
        (f"difference to {baseline.label} [95 %]", lambda row: _difference(config, row, baseline)),
        ("final (%)", lambda row: _summary(_finals(row, "test/accuracy", 100.0))),
    ]
    if config.val_share:
        columns.append((f"validation, last {tail} (%)", lambda row: _summary(_tails(config, row, "val"))))
    if config.target:
        columns.append((f"rounds to {100 * config.target:g} %", lambda row: _rounds_to(config, row)))
    columns += [
        ("MiB up", lambda row: _summary(_finals(row, "comm/up_bytes_total", 1 / MIB), spread=False)),
        ("MiB down", lambda row: _summary(_finals(row, "comm/down_bytes_total", 1 / MIB), spread=False)),
    ]
    if config.landscape:
        columns.append(("largest Hessian eigenvalue", lambda row: _summary(_finals(row, "landscape/hessian"))))
        columns.append(("sharpness", lambda row: _summary(_finals(row, "landscape/sharpness"), digits=4)))
    table = markdown([name for name, _ in columns], [[make(row) for _, make in columns] for row in rows])
    notes = "\n".join(f"- {note}" for note in _notes(config, rows))
    head = f"### {config.name}"
    return "\n\n".join(part for part in (head, warning_of(config), table, notes) if part) + "\n"


def _is(row: Picked, label: str) -> bool:
    return row.label == label or row.label.partition(" ")[0] == label


def _tails(config: CompareConfig, row: Picked, split: str) -> dict[int, float]:
    found = {seed: tail_mean(record, f"{split}/accuracy", config.tail) for seed, record in row.records.items()}
    return {seed: 100 * value for seed, value in found.items() if value is not None}


def _finals(row: Picked, metric: str, factor: float = 1.0) -> dict[int, float]:
    return {s: factor * r["metrics"][metric] for s, r in row.records.items() if metric in r["metrics"]}


def _summary(values: Mapping[int, float], digits: int = 2, spread: bool = True) -> str:
    if not values:
        return "–"
    found = summarise(list(values.values()))
    sd = f" ± {found.sd:.{digits}f}" if spread and found.sd is not None else ""
    return f"{found.mean:.{digits}f}{sd}"


def _difference(config: CompareConfig, row: Picked, baseline: Picked) -> str:
    if row is baseline:
        return "–"
    found = paired_difference(_tails(config, row, "test"), _tails(config, baseline, "test"))
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return f"{found.mean:+.2f}"
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def _rounds_to(config: CompareConfig, row: Picked) -> str:
    """Mean over the seeds that reached the target, and how many did where not all."""
    firsts = [
        next((r for r, value in curve(record, "test/accuracy") if value >= config.target), None)
        for record in row.records.values()
    ]
    reached = [first for first in firsts if first is not None]
    if not reached:
        return "–"
    mean = f"{sum(reached) / len(reached):.1f}"
    return mean if len(reached) == len(firsts) else f"{mean} ({len(reached)} of {len(firsts)} seeds)"


def _notes(config: CompareConfig, rows: Sequence[Picked]) -> list[str]:
    cap = f" (at most {config.max_steps} steps)" if config.max_steps else ""
    federation = (
        f"{config.data.name}, {_clients(config)}, {config.fraction:g} of them a round, batch {config.batch_size},"
        f" {config.local_epochs} local epochs{cap}, {config.rounds} rounds, seeds"
        f" {', '.join(map(str, config.seeds))};"
        " mean ± sample deviation over seeds, differences paired by seed with their 95 % t-interval"
    )
    notes = [federation]
    if config.pick != "none" and any(row.of > 1 for row in rows):
        where = "the validation split" if config.pick == "val" else "THE TEST SPLIT"
        notes.append(f"rates picked on {where} by the mean over seeds of the last {config.tail} evaluations")
    if config.landscape:
        notes.append(
            "eigenvalue and sharpness (filter-normalised, radius 0.1) of the last model, on up to"
            f" {LANDSCAPE_SAMPLES:,} training samples"
        )
    sizes = {row.of for row in rows}
    if config.pick != "none" and len(sizes) > 1:
        notes.append("unequal tuning: " + ", ".join(f"{row.label} {row.of}" for row in rows) + " rates")
    edges = [f"{row.label} ({row.rate:g})" for row in rows if row.at_edge]
    if edges:
        notes.append(f"picked at the end of the grid: {', '.join(edges)}")
    lost = [
        f"{row.label} at {', '.join('its default rate' if r is None else f'{r:g}' for r in row.diverged)}"
        for row in rows
        if row.diverged
    ]
    if lost:
        notes.append(f"diverged in some seed and out of the choice: {'; '.join(lost)}")
    return notes


def _clients(config: CompareConfig) -> str:
    """The partition in words."""
    partition = config.partition
    if partition.file is not None:
        return f"clients of {partition.file.name}"
    if partition.scheme == "column":
        return "natural clients"
    skew = {"dirichlet_client": f" (alpha {partition.alpha:g})", "dirichlet_label": f" (alpha {partition.alpha:g})"}
    each = f", {partition.samples} samples each" if partition.samples else ""
    return f"{partition.clients} clients by {partition.scheme}{skew.get(partition.scheme, '')}{each}"


def draw_curves(config: CompareConfig, rows: Sequence[Picked]) -> bytes:
    """Test accuracy over rounds of the picked rates as PNG."""
    from fedcore.figures import curves

    lines = {
        row.label if row.rate is None else f"{row.label}, {row.rate:g}": [
            curve(record, "test/accuracy") for record in row.records.values()
        ]
        for row in rows
        if row.records
    }
    return curves(lines, title=config.name, target=config.target or None)
