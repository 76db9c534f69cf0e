"""One table from many runs: mean and deviation over seeds, paired differences, no mixing of what cannot be compared."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from polymodal.errors import UserError
from polymodal.stats import PairedDifference, Summary, paired_difference, summarise

__all__ = ["FORMATS", "Measured", "Row", "Table", "build_table", "format_difference", "format_summary", "markdown"]

_PERCENT = ("bleu", "rouge", "chrf", "miou", "forgetting")


@dataclass(frozen=True)
class Measured:
    """The numbers of one run, as a table needs them.

    Args:
        group: row of the table this run belongs to.
        seed: root seed; pairs runs across groups.
        metrics: final metrics by full name.
        fidelity: of the method.
        signatures: metric name -> definition of the metric.
        fingerprint: of the data.
        data: name of the data, for messages.
        config_hash: equal for runs that differ in the seed only.
        source: where it was read, for messages.
        started: ISO time; of two runs of one group and seed the later one counts.
    """

    group: str
    seed: int
    metrics: Mapping[str, float]
    fidelity: str = ""
    signatures: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    data: str = ""
    config_hash: str = ""
    source: str = ""
    started: str = ""


@dataclass(frozen=True)
class Row:
    """One group: its seeds, a summary and the value by seed of each metric, the difference to the baseline group.

    ``sources`` names the run of each seed.
    """

    group: str
    fidelity: str
    seeds: tuple[int, ...]
    sources: tuple[str, ...]
    summaries: Mapping[str, Summary]
    values: Mapping[str, Mapping[int, float]]
    differences: Mapping[str, PairedDifference]


@dataclass(frozen=True)
class Table:
    """Rows by group, columns by metric.

    Args:
        title: heading.
        by: what the rows are.
        metrics: columns, full names.
        rows: in the order in which the groups first appear.
        against: baseline group of the paired differences, or ``None``.
        notes: what a reader must know: runs left out, duplicates, mixtures.
    """

    title: str
    by: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    against: str | None = None
    notes: tuple[str, ...] = ()


def build_table(
    runs: Sequence[Measured],
    metrics: Sequence[str],
    *,
    title: str = "",
    by: str = "method",
    against: str | None = None,
    mix: bool = False,
    notes: Iterable[str] = (),
) -> Table:
    """Group runs, summarise them over seeds and compare with a baseline group.

    Args:
        runs: what was measured.
        metrics: columns, in this order.
        title: heading.
        by: name of the first column.
        against: baseline group.
        mix: allow different data fingerprints and metric signatures in one table (noted instead of refused).
        notes: lines to start the table's notes with.

    Raises:
        UserError: runs of different data or metric definitions without ``mix``; an unknown baseline group.
    """
    collected = list(notes)
    for problem in _mixtures(runs, metrics):
        if not mix:
            raise UserError(f"{problem}; choose runs with --where KEY=VALUE, or mix them knowingly with --mix")
        collected.append(problem)
    groups: dict[str, list[Measured]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    if against is not None and against not in groups:
        raise UserError(f"--against {against}: no such {by} among the runs; known: {', '.join(groups) or 'none'}")
    kept = {group: _one_per_seed(group, members, collected) for group, members in groups.items()}
    values = {group: _values(members, metrics, collected) for group, members in kept.items()}
    rows = []
    for group, by_seed in kept.items():
        differences = {}
        if against is not None and group != against:
            for metric in metrics:
                difference = paired_difference(values[group][metric], values[against][metric])
                if difference is not None:
                    differences[metric] = difference
        rows.append(
            Row(
                group=group,
                fidelity=" / ".join(sorted({m.fidelity for m in by_seed.values() if m.fidelity})),
                seeds=tuple(sorted(by_seed)),
                sources=tuple(by_seed[seed].source for seed in sorted(by_seed)),
                summaries={m: summarise(list(v.values())) for m, v in values[group].items() if v},
                values=values[group],
                differences=differences,
            )
        )
    return Table(title, by, tuple(metrics), tuple(rows), against, tuple(collected))


def _mixtures(runs: Sequence[Measured], metrics: Sequence[str]) -> list[str]:
    """One line for each thing that makes the runs incomparable."""
    problems = []
    prints: dict[str, list[Measured]] = {}
    for run in runs:
        prints.setdefault(run.fingerprint, []).append(run)
    if len(prints) > 1:
        parts = [
            f"{_short(key)} ({m[0].data or 'unnamed'}: {_runs(m)}, e.g. {m[0].source})" for key, m in prints.items()
        ]
        problems.append(f"{len(prints)} data fingerprints: {', '.join(parts)}")
    for metric in metrics:
        kinds: dict[str, list[Measured]] = {}
        for run in runs:
            if metric in run.metrics:
                kinds.setdefault(run.signatures.get(metric, ""), []).append(run)
        if len(kinds) > 1:
            parts = [f"{k or 'none'} ({_runs(m)}, e.g. {m[0].source})" for k, m in kinds.items()]
            problems.append(f"{metric} has {len(kinds)} definitions: {', '.join(parts)}")
    return problems


def _runs(members: Sequence[Measured]) -> str:
    return f"{len(members)} run{'s' * (len(members) > 1)}"


def _short(fingerprint: str) -> str:
    return fingerprint[:12] or "none"


def _one_per_seed(group: str, members: Sequence[Measured], notes: list[str]) -> dict[int, Measured]:
    """The newest run of each seed, so that no seed counts twice; says what it left out."""
    by_seed: dict[int, Measured] = {}
    for run in sorted(members, key=lambda m: (m.started, m.source)):
        by_seed[run.seed] = run
    dropped = len(members) - len(by_seed)
    if dropped:
        notes.append(f"{group}: {dropped} older run{'s' * (dropped > 1)} of the same seed left out")
    hashes = {m.config_hash for m in by_seed.values()}
    if len(hashes) > 1:
        notes.append(f"{group}: {len(hashes)} different configurations in one row; `--by KEY` separates them")
    return by_seed


def _values(by_seed: Mapping[int, Measured], metrics: Sequence[str], notes: list[str]) -> dict[str, dict[int, float]]:
    """Finite values by metric and seed."""
    values: dict[str, dict[int, float]] = {}
    for metric in metrics:
        found = {seed: m.metrics[metric] for seed, m in sorted(by_seed.items()) if metric in m.metrics}
        values[metric] = {seed: v for seed, v in found.items() if math.isfinite(v)}
        lost = len(found) - len(values[metric])
        if lost:
            group = next(iter(by_seed.values())).group
            notes.append(f"{group}: {metric} is not finite in {lost} of {len(found)} runs; those are left out of it")
    return values


# ------------------------------------------------------------------ formats


def decimals(metric: str, value: float) -> int:
    """Digits after the point: 2 for scores in percent, else by magnitude."""
    if metric.rpartition("/")[2].startswith(_PERCENT):
        return 2
    size = abs(value)
    return 4 if size < 10 else 2 if size < 1000 else 0


def format_summary(metric: str, summary: Summary | None) -> str:
    """``mean ± sd``; only the mean for one value; a dash for none."""
    if summary is None:
        return "–"
    digits = decimals(metric, summary.mean)
    if summary.sd is None:
        return f"{summary.mean:.{digits}f}"
    return f"{summary.mean:.{digits}f} ± {summary.sd:.{digits}f}"


def format_difference(metric: str, difference: PairedDifference | None) -> str:
    """``+mean [low, high]``; without interval below two pairs; a dash for none."""
    if difference is None:
        return "–"
    digits = decimals(metric, difference.mean)
    text = f"{difference.mean:+.{digits}f}"
    if difference.low is None or difference.high is None:
        return text
    return f"{text} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An aligned Markdown table: first column left, the others right where every cell is a number."""
    cells = [[str(c).replace("|", "\\|").replace("\n", " ") for c in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    numeric = [i > 0 and _all_numbers([row[i] for row in cells[1:]]) for i in range(len(header))]
    lines = []
    for row in cells:
        aligned = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        lines.append("| " + " | ".join(aligned) + " |")
    rule = ["-" * (w - 1) + ":" if n else "-" * w for w, n in zip(widths, numeric, strict=True)]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def _all_numbers(column: Sequence[str]) -> bool:
    """Whether every cell is a number or a dash, and not all are dashes."""
    return all(c == "–" or c[:1] in "+-0123456789" for c in column) and any(c != "–" for c in column)


def _cells(table: Table) -> tuple[list[str], list[list[str]]]:
    header = [table.by, "fidelity", "seeds", *table.metrics]
    rows = [
        [r.group, r.fidelity or "–", str(len(r.seeds)), *(format_summary(m, r.summaries.get(m)) for m in table.metrics)]
        for r in table.rows
    ]
    return header, rows


def _difference_cells(table: Table) -> tuple[list[str], list[list[str]]]:
    header = [f"{table.by} − {table.against}", "pairs", *table.metrics]
    rows = []
    for row in table.rows:
        if row.group == table.against:
            continue
        pairs = max((d.n for d in row.differences.values()), default=0)
        rows.append([row.group, str(pairs), *(format_difference(m, row.differences.get(m)) for m in table.metrics)])
    return header, rows


def to_markdown(tables: Sequence[Table]) -> str:
    """Heading, table, paired differences and notes of each table as Markdown."""
    parts: list[str] = []
    for table in tables:
        parts += [f"### {table.title}"] if table.title else []
        parts.append(markdown(*_cells(table)))
        if table.against is not None and len(table.rows) > 1:
            parts.append(f"Difference to `{table.against}`, paired by seed: mean [95 % t-interval].")
            parts.append(markdown(*_difference_cells(table)))
        if table.notes:
            parts.append("\n".join(f"- {note}" for note in table.notes))
    return "\n\n".join(parts) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """One line a table, group and metric, in full precision, below one header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = [
        "table",
        "group",
        "fidelity",
        "metric",
        "n",
        "mean",
        "sd",
        "against",
        "pairs",
        "difference",
        "low",
        "high",
    ]
    writer.writerow(header)
    for table in tables:
        for row in table.rows:
            for metric, summary in row.summaries.items():
                cells = [table.title, row.group, row.fidelity, metric, summary.n, summary.mean, summary.sd]
                difference = row.differences.get(metric)
                if difference is not None:
                    cells += [table.against, difference.n, difference.mean, difference.low, difference.high]
                writer.writerow(cells + [None] * (len(header) - len(cells)))
    return text.getvalue()


def to_tex(tables: Sequence[Table]) -> str:
    """A ``tabular`` with booktabs rules for each table, and one for its differences."""
    parts = []
    for table in tables:
        parts.append(_tabular(*_cells(table)))
        if table.against is not None and len(table.rows) > 1:
            parts.append(_tabular(*_difference_cells(table)))
    return "\n\n".join(parts) + "\n"


def _tabular(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" & ".join(_tex(c) for c in row) + r" \\" for row in (header, *rows)]
    columns = "l" + "r" * (len(header) - 1)
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"])


def _tex(text: str) -> str:
    for plain, escaped in (("\\", r"\textbackslash "), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#")):
        text = text.replace(plain, escaped)
    return text.replace("±", r"$\pm$").replace("−", "$-$").replace("–", "--")


FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {"md": to_markdown, "csv": to_csv, "tex": to_tex}
