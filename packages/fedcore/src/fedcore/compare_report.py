"""From the records of a comparison to picked options, one Markdown table and the curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from polymodal.stats import paired_difference, summarise
from polymodal.tables import markdown

from fedcore.compare_cell import LANDSCAPE_SAMPLES, curve
from fedcore.compare_grid import CellKey, Method, Point, edges, said, short_names
from fedcore.compare_settings import CompareConfig

__all__ = ["Picked", "Records", "accuracy_of", "draw_curves", "pick_rates", "tail_mean", "to_table", "warning_of"]

Records = Mapping[CellKey, Mapping[str, Any]]
MIB = 2.0**20
EPSILON = "epsilon"
PRIVACY = {EPSILON: "epsilon", "delta": "delta", "sigma": "noise_multiplier", "C": "clip"}
"""column of a private comparison -> field of the privacy report"""
IN_PRIVACY = ("privacy.clip", "privacy.noise_multiplier", "privacy.delta")
"""options that those columns show"""


@dataclass(frozen=True)
class Picked:
    """One row of the table.

    Args:
        label: name of the row.
        rate: the rate that was picked; the algorithm's own where no rate was given.
        point: values of all options that had a grid, as picked.
        of: number of points in the grid.
        runs: number of runs, over points and seeds.
        edges: options whose value is the lowest or highest of several.
        diverged: points of the grid with a seed that diverged.
        records: by seed; empty where all points diverged.
    """

    label: str
    rate: float | None
    point: Mapping[str, Any]
    of: int
    runs: int
    edges: tuple[str, ...]
    diverged: tuple[Point, ...]
    records: Mapping[int, Mapping[str, Any]]


def tail_mean(record: Mapping[str, Any], metric: str, count: int) -> float | None:
    """Mean of the last ``count`` values of a metric; None where it was never measured."""
    values = [value for _, value in curve(record, metric)][-count:]
    return sum(values) / len(values) if values else None


def pick_rates(config: CompareConfig, records: Records) -> list[Picked]:
    """For each method the point of its grid with the best mean over seeds of the mean accuracy of the last evaluations.

    Options are picked jointly. A point with a diverged seed is out. With ``pick=none`` each point is a row of its own.
    """
    rows = []
    for method in config.rows():
        if config.pick == "none":
            rows += [
                _picked(config, method, [point], records, f"{method.label} {_point(point)}" if point else method.label)
                for point in method.points
            ]
        else:
            rows.append(_picked(config, method, method.points, records, method.label))
    return rows


def _picked(config: CompareConfig, method: Method, points: Sequence[Point], records: Records, label: str) -> Picked:
    label_of = method.label
    runs = {
        p: {s: records[label_of, p, s] for s in config.seeds if (label_of, p, s) in records or not config.screens}
        for p in points
    }
    diverged = tuple(p for p, found in runs.items() if any(r["status"] != "finished" for r in found.values()))
    good = {p: found for p, found in runs.items() if p not in diverged and len(found) == len(config.seeds)}
    total = sum(map(len, runs.values()))
    if not good:
        return Picked(label, None, {}, len(points), total, (), diverged, {})
    best = max(good, key=lambda point: accuracy_of(config, good[point]))
    at = edges(method.grid, dict(best)) if len(points) > 1 else ()
    shown = next(iter(good[best].values()))["rate"]
    return Picked(label, shown, dict(best), len(points), total, at, diverged, good[best])


def accuracy_of(config: CompareConfig, runs: Mapping[int, Mapping[str, Any]]) -> float:
    """What options are picked by: mean over seeds of the mean accuracy of the last evaluations."""
    split = "test" if config.pick == "test" else "val"
    values = [tail_mean(record, f"{split}/accuracy", config.tail) for record in runs.values()]
    return sum(v for v in values if v is not None) / max(len(values), 1)


def _point(point: Point | Mapping[str, Any]) -> str:
    """The rate alone, or options by name where there are more."""
    chosen = dict(point)
    if tuple(chosen) == ("lr",):
        return said(chosen["lr"])
    names = short_names(chosen)
    return ", ".join(f"{names[name]} {said(value)}" for name, value in chosen.items()) or "its defaults"


# ------------------------------------------------------------------ table


def warning_of(config: CompareConfig) -> str:
    """One line where options were picked on the test samples; empty otherwise."""
    if config.pick != "test" or all(len(method.points) < 2 for method in config.rows()):
        return ""
    return "WARNING: rates were picked on the test samples; these accuracies are too good. Use --pick val for results."


Column = tuple[str, Callable[[Picked], str]]


def to_table(config: CompareConfig, rows: Sequence[Picked]) -> str:
    """Heading, table and notes as Markdown."""
    tail = min(config.tail, -(-config.rounds // config.eval_every))
    baseline = next((row for row in rows if _is(row, config.against or rows[0].label)), rows[0])
    columns: list[Column] = [
        ("method", lambda row: row.label),
        ("rate", lambda row: "–" if row.rate is None else f"{row.rate:g}"),
        *_option_columns(rows),
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


def _option_columns(rows: Sequence[Picked]) -> list[Column]:
    """What was picked besides the rate, ranks where methods differ in them, and what is promised of private methods."""
    picked = dict.fromkeys(name for row in rows for name in row.point if name not in {"lr", *IN_PRIVACY})
    names = short_names(picked)
    columns: list[Column] = [(names[name], partial(_value, name)) for name in picked]
    if "lora.ranks" not in picked and len({_ranks(row) for row in rows if row.records}) > 1:
        columns.append(("ranks", _ranks))
    if any(_promise(row) for row in rows):
        columns += [(title, partial(_promised, title)) for title in PRIVACY]
    return columns


def _value(name: str, row: Picked) -> str:
    return said(row.point[name]) if name in row.point else "–"


def _ranks(row: Picked) -> str:
    lora: Mapping[str, Any] = next((record["settings"].get("lora", {}) for record in row.records.values()), {})
    return ", ".join(map(str, lora.get("ranks", ()))) or "–"


def _promise(row: Picked) -> dict[str, Any]:
    """The privacy report with the largest epsilon of any seed; empty for methods that are not private."""
    found = [record["privacy"] for record in row.records.values() if record.get("privacy")]
    return max(found, key=_epsilon, default={})


def _epsilon(report: Mapping[str, Any]) -> float:
    return float(report["epsilon"])  # infinity is written as a text


def _promised(title: str, row: Picked) -> str:
    report = _promise(row)
    if not report:
        return "–"
    if title == EPSILON:
        return "∞" if math.isinf(_epsilon(report)) else f"{_epsilon(report):.2f}"
    return said(report[PRIVACY[title]])


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
    local = f"{config.max_steps} local steps each" if config.exact_steps else f"{config.local_epochs} local epochs{cap}"
    share = "all" if config.fraction == 1 else f"{config.fraction:g}"
    federation = (
        f"{config.data.name}, {_clients(config)}, {share} of them a round, batch {config.batch_size},"
        f" {local}, {config.rounds} rounds, seeds"
        f" {', '.join(map(str, config.seeds))};"
        " mean ± sample deviation over seeds, differences paired by seed with their 95 % t-interval"
    )
    notes = [federation, *_adapter_notes(config), *_privacy_notes(config, rows)]
    several = any(set(row.point) - {"lr"} for row in rows)
    if config.pick != "none" and any(row.of > 1 for row in rows):
        where = "the validation split" if config.pick == "val" else "THE TEST SPLIT"
        what = "options with a grid picked jointly" if several else "rates picked"
        notes.append(f"{what} on {where} by the mean over seeds of the last {config.tail} evaluations")
    if config.screens:
        screened = ", ".join(map(str, config.seeds[: config.screen]))
        which = "seed" if config.screen == 1 else "seeds"
        notes.append(
            f"the whole grid was run on {which} {screened}; all seeds were run at the best point and its neighbours,"
            " one step in one option, until the best of those that have all seeds had no neighbour without"
        )
    if config.landscape:
        notes.append(
            "eigenvalue and sharpness (filter-normalised, radius 0.1) of the last model, on up to"
            f" {LANDSCAPE_SAMPLES:,} training samples"
        )
    sizes = {row.of for row in rows}
    if config.pick != "none" and len(sizes) > 1:
        counted = ", ".join(f"{row.label} {row.of}" for row in rows)
        notes.append(f"unequal tuning: {counted} {'combinations' if several else 'rates'}")
    ends = [f"{row.label} ({_point({name: row.point[name] for name in row.edges})})" for row in rows if row.edges]
    if ends:
        notes.append(f"picked at the end of the grid: {', '.join(ends)}")
    between = "; " if several else ", "
    lost = [f"{row.label} at {between.join(map(_lost, row.diverged))}" for row in rows if row.diverged]
    if lost:
        notes.append(f"diverged in some seed and out of the choice: {'; '.join(lost)}")
    return notes


def _adapter_notes(config: CompareConfig) -> list[str]:
    if not config.lora.on:
        return []
    ranks = ", ".join(map(str, config.lora.ranks))
    note = f"adapters of ranks {ranks} in turn over the clients, s = {config.lora.scaling:g}"
    if config.lora.pretrain_epochs:
        labels = ", ".join(map(str, config.lora.pretrain_labels))
        note += f"; the base was trained for {config.lora.pretrain_epochs} epochs on samples that no client has"
        note += f", of the labels {labels}" if labels else ""
    return [note]


def _privacy_notes(config: CompareConfig, rows: Sequence[Picked]) -> list[str]:
    report = next((found for found in map(_promise, rows) if found), None)
    if report is None:
        return []
    runs = sum(row.runs for row in rows if _promise(row))
    return [
        f"epsilon by the {report['accountant']} accountant, for one client added or removed, of one run:"
        f" the {runs} private runs of this table are not added up, and the validation samples on which options were"
        " picked count as public"
    ]


def _lost(point: Point) -> str:
    return _point(point) if point else "its default rate"


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
