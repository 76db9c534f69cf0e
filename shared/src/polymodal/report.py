"""`polymodal report`: run folders to one table a task, with curves and an HTML page."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from polymodal.dashboards import Layout, layout_for, sections_of
from polymodal.errors import UserError, did_you_mean
from polymodal.files import check_writable, write_bytes, write_text
from polymodal.run_reader import Point, RunRecord, find_runs, flatten
from polymodal.tables import FORMATS, Measured, Table, build_table

__all__ = ["ReportOptions", "TaskReport", "collect", "render", "write_report"]

MAX_COLUMNS = 8


@dataclass(frozen=True)
class ReportOptions:
    """What to report.

    Args:
        runs: run folders or folders of run folders.
        by: what the rows are: dotted keys of the manifest or the configuration, several joined by commas.
        metrics: names or patterns (``test/*``); empty: the final test scores.
        where: ``KEY=VALUE`` conditions, all of which must hold; VALUE may be a pattern.
        against: group that the paired differences are taken to.
        mix: allow different data fingerprints and metric definitions in one table.
        unfinished: include runs that did not come to their end.
    """

    runs: tuple[Path, ...] = (Path("runs"),)
    by: str = "method"
    metrics: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    against: str | None = None
    mix: bool = False
    unfinished: bool = False


@dataclass(frozen=True)
class TaskReport:
    """The runs of one task and kind of job.

    Args:
        task: package's name.
        job: ``train`` or ``eval``.
        table: the numbers.
        groups: group -> the runs that its row was made from, by seed.
        records: all runs of the task, unfinished ones included.
        layout: order of the sections.
    """

    task: str
    job: str
    table: Table
    groups: dict[str, list[RunRecord]]
    records: list[RunRecord]
    layout: Layout

    def curves(self, metric: str) -> dict[str, list[list[Point]]]:
        """Group -> the curve of each of its runs; empty for a run without this metric."""
        return {group: [r.curves.get(metric, []) for r in members] for group, members in self.groups.items()}

    def curve_sections(self) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
        """Section titles with (panel title, metric, x label) of every metric with a curve of two points or more."""
        names = {
            name
            for members in self.groups.values()
            for record in members
            for name, points in record.curves.items()
            if len(points) > 1
        }
        for title, panels in sections_of(self.layout, names):
            yield title, [(p.title, p.metrics[0], p.x) for p in panels]


def collect(options: ReportOptions) -> list[TaskReport]:
    """Read, select and tabulate.

    Raises:
        UserError: nothing to report, an unknown key, metric or baseline, or runs that must not be mixed.
    """
    records, skipped = find_runs(options.runs)
    where = ", ".join(map(str, options.runs))
    if not records:
        raise UserError(f"no run under {where}: expected folders with a manifest.json, as training commands write them")
    records = [r for r in records if all(_matches(r, condition) for condition in options.where)]
    if not records:
        raise UserError(f"no run under {where} fulfils {' and '.join(options.where)}")
    tasks: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        tasks.setdefault((record.text("task", "unknown"), record.text("job_type", "train")), []).append(record)
    if options.metrics and len(tasks) > 1:  # a metric of one task leaves the runs of the others out
        having = {key: members for key, members in tasks.items() if _has_any(members, options)}
        tasks = having or tasks
    found: list[TaskReport] = []
    for (task, job), members in tasks.items():
        # A manifest that cannot be read belongs to no task: the first table says so.
        report = _task_report(task, job, members, options, [] if found else skipped)
        found += [report] if report is not None else []
    if not found:
        states = ", ".join(sorted({r.text("status", "unknown") for r in records}))
        raise UserError(f"no finished run under {where} ({len(records)} are {states}); --unfinished includes them")
    return found


def _has_any(records: Sequence[RunRecord], options: ReportOptions) -> bool:
    names = set().union(*(r.metrics for r in records if r.finished or options.unfinished))
    return any(fnmatch.filter(names, pattern) for pattern in options.metrics)


def _task_report(
    task: str, job: str, members: list[RunRecord], options: ReportOptions, skipped: Sequence[str]
) -> TaskReport | None:
    chosen = [r for r in members if r.finished or options.unfinished]
    if not chosen:
        return None
    notes = list(skipped)
    if len(chosen) < len(members):
        left = [r.text("status", "unknown") for r in members if not r.finished]
        parts = ", ".join(f"{left.count(s)} {s}" for s in sorted(set(left)))
        notes.append(f"left out: {parts}; `--unfinished` includes them")
    layout = layout_for(task)
    metrics = _choose_metrics(chosen, options.metrics, layout, notes)
    labels = _labels(chosen, options.by)
    measured = [_measured(r, labels[str(r.path)]) for r in chosen]
    title = f"{task}: {_describe_data(chosen)}" if job == "train" else f"{task} ({job}): {_describe_data(chosen)}"
    table = build_table(
        measured, metrics, title=title, by=options.by, against=options.against, mix=options.mix, notes=notes
    )
    by_path = {str(r.path): r for r in chosen}
    groups = {row.group: [by_path[source] for source in row.sources] for row in table.rows}
    return TaskReport(task, job, table, groups, members, layout)


def _describe_data(records: Sequence[RunRecord]) -> str:
    names = dict.fromkeys(f"{r.lookup('data.name') or 'data unnamed'}" for r in records)
    prints = {r.fingerprint for r in records if r.fingerprint}
    suffix = f" ({prints.pop()[:12]})" if len(prints) == 1 else ""
    return f"{', '.join(names)}{suffix}"


def _measured(record: RunRecord, group: str) -> Measured:
    return Measured(
        group=group,
        seed=record.seed,
        metrics=record.metrics,
        fidelity=record.text("fidelity"),
        signatures=record.signatures,
        fingerprint=record.fingerprint,
        data=str(record.lookup("data.name") or ""),
        config_hash=record.text("config_hash"),
        source=str(record.path),
        started=record.text("started"),
    )


def _matches(record: RunRecord, condition: str) -> bool:
    key, equals, wanted = condition.partition("=")
    if not equals or not key:
        raise UserError(f"--where {condition}: expected KEY=VALUE, e.g. --where data.name=synthetic")
    value = record.lookup(key)
    return fnmatch.fnmatchcase(str(value), wanted) or value == yaml.safe_load(wanted)


def _labels(records: Sequence[RunRecord], by: str) -> dict[str, str]:
    """Group label of each run, by path."""
    keys = [k.strip() for k in by.split(",") if k.strip()]
    if not keys:
        raise UserError("--by needs a key, e.g. --by method")
    for key in keys:
        if all(r.lookup(key) is None for r in records):
            known = sorted({k for r in records for k in (*flatten(r.manifest), *r.config)})
            close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            close = close or [k for k in known if k.endswith(f".{key}")][:3]
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise UserError(f"--by {key}: no run has this key in its manifest or configuration{hint}")
    return {str(r.path): " / ".join(_label(r.lookup(k)) for k in keys) for r in records}


def _label(value: object) -> str:
    return "–" if value in (None, "") else str(value)


def _choose_metrics(
    records: Sequence[RunRecord], wanted: Sequence[str], layout: Layout, notes: list[str]
) -> tuple[str, ...]:
    known = set().union(*(r.metrics for r in records))
    order = [m for s in layout.sections for p in s.panels for m in p.metrics]
    # Scores of the run itself come before those of probes and baselines inside it (test/copy_question/bleu4).
    ranked = sorted(known, key=lambda m: (m.count("/"), order.index(m) if m in order else len(order), m))
    if wanted:
        chosen: dict[str, None] = {}
        for pattern in wanted:
            found = [m for m in ranked if fnmatch.fnmatchcase(m, pattern)]
            if not found:
                hint = did_you_mean(pattern, known, 3)
                raise UserError(f"--metric {pattern}: no run has it; {hint}known: {', '.join(ranked[:20]) or 'none'}")
            chosen.update(dict.fromkeys(found))
        return tuple(chosen)
    for prefix in ("test/", "val/", ""):
        found = [m for m in ranked if m.startswith(prefix)]
        if found:
            break
    if len(found) > MAX_COLUMNS:
        notes.append(f"{len(found) - MAX_COLUMNS} more metrics; choose with `--metric`, e.g. `--metric 'test/*'`")
    return tuple(found[:MAX_COLUMNS])


def render(reports: Sequence[TaskReport], form: str, options: ReportOptions) -> str:
    """The report as text of one format: ``md``, ``csv``, ``tex`` or ``html``."""
    if form == "html":
        from polymodal.report_html import page

        return page(reports, options)
    return FORMATS[form]([r.table for r in reports])


def write_report(
    reports: Sequence[TaskReport], options: ReportOptions, folder: Path, forms: Sequence[str], plot: bool = False
) -> list[Path]:
    """Write ``report.<form>`` and, with ``plot``, ``curves/<metric>.png``.

    Returns:
        The files, in the order written.

    Raises:
        UserError: the folder cannot be written.
    """
    check_writable(folder)
    files = []
    for form in forms:
        files.append(folder / f"report.{form}")
        write_text(files[-1], render(reports, form, options))
    if plot:
        files += _write_curves(reports, folder / "curves")
    return files


def _write_curves(reports: Sequence[TaskReport], folder: Path) -> list[Path]:
    from polymodal.curves import average, to_png

    check_writable(folder)
    files = []
    for report in reports:
        for _, panels in report.curve_sections():
            for _, metric, x in panels:
                prefix = f"{report.task}-{report.job}-" if len(reports) > 1 else ""
                files.append(folder / f"{prefix}{metric.replace('/', '-')}.png")
                write_bytes(files[-1], to_png(metric, average(report.curves(metric)), x))
    return files
