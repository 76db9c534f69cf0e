"""The HTML report: one file without any outside address, the offline twin of the W&B dashboard."""

from __future__ import annotations

import base64
import datetime as dt
import importlib.resources
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from polymodal import report_svg as svg
from polymodal.compare import config_differences
from polymodal.curves import average, color
from polymodal.run_reader import RunRecord, Sheet
from polymodal.tables import Row, Table, format_difference, format_summary

if TYPE_CHECKING:
    from polymodal.report import ReportOptions, TaskReport

__all__ = ["page"]

_MAX_PICTURES, _MAX_PICTURE_BYTES = 4, 600_000
_MAX_SAMPLES = 12
_MAX_DOTS = 6
_MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif"}


def page(reports: Sequence[TaskReport], options: ReportOptions) -> str:
    """The complete page.

    Args:
        reports: one a task.
        options: what was asked for, named in the footer.
    """
    assets = importlib.resources.files("polymodal") / "assets"
    style = (assets / "report.css").read_text(encoding="utf-8")
    script = (assets / "report.js").read_text(encoding="utf-8")
    runs = sum(len(members) for r in reports for members in r.groups.values())
    tasks = ", ".join(dict.fromkeys(r.task for r in reports))
    now = dt.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    asked = _command_line(options)
    body = "".join(_task(r, heading=len(reports) > 1) for r in reports)
    title = tasks if len(reports) > 1 else reports[0].table.title
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><p>{runs} run{'s' * (runs != 1)} · {escape(now)}</p></header>"
        f"<main>{body}</main><footer><code>{escape(asked)}</code></footer><script>{script}</script></body></html>\n"
    )


def _command_line(options: ReportOptions) -> str:
    """The command that makes this table again."""
    parts = ["polymodal", "report", *map(str, options.runs), "--by", options.by]
    parts += ["--metric", *options.metrics] if options.metrics else []
    parts += ["--where", *options.where] if options.where else []
    parts += ["--against", options.against] if options.against is not None else []
    parts += ["--mix"] * options.mix + ["--unfinished"] * options.unfinished
    return shlex.join(parts)


def _task(report: TaskReport, heading: bool) -> str:
    colors = {row.group: color(i) for i, row in enumerate(report.table.rows)}
    parts = [f"<h2>{escape(report.table.title)}</h2>"] if heading else []
    parts += [_notes(report.table), _scores(report.table, colors)]
    parts += [_seeds(report.table, colors), _differences(report.table, colors)]
    parts += [_legend(report.table, colors), *_curves(report, colors)]
    parts += [_samples(report), _pictures(report), _config(report), _run_list(report)]
    return f"<article>{''.join(parts)}</article>"


def _notes(table: Table) -> str:
    if not table.notes:
        return ""
    return f'<ul class="notes">{"".join(f"<li>{_prose(n)}</li>" for n in table.notes)}</ul>'


def _prose(text: str) -> str:
    """Escaped text with `code` marked as such."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _swatch(group: str, colors: dict[str, str]) -> str:
    return f'<i class="swatch" style="background:{colors[group]}"></i>{escape(group)}'


def _scores(table: Table, colors: dict[str, str]) -> str:
    head = "".join(f"<th class=num>{escape(m)}</th>" for m in table.metrics)
    rows = []
    for row in table.rows:
        cells = "".join(f"<td class=num>{_mean_sd(row, m)}</td>" for m in table.metrics)
        fidelity = f"<span class='badge {escape(row.fidelity)}'>{escape(row.fidelity)}</span>" if row.fidelity else "–"
        seeds = f"<td class=num title='seeds {', '.join(map(str, row.seeds))}'>{len(row.seeds)}</td>"
        rows.append(f"<tr><th>{_swatch(row.group, colors)}</th><td>{fidelity}</td>{seeds}{cells}</tr>")
    spread = any(len(row.seeds) > 1 for row in table.rows)
    return (
        f"<div class=scroll><table class=scores><thead><tr><th>{escape(table.by)}</th><th>fidelity</th>"
        f"<th class=num>seeds</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"<p class=hint>{'Mean ± standard deviation over seeds.' if spread else 'One run each.'}</p>"
    )


def _mean_sd(row: Row, metric: str) -> str:
    mean, plus, sd = format_summary(metric, row.summaries.get(metric)).partition(" ± ")
    return f"<b>{mean}</b>" + (f" <span class=sd>± {sd}</span>" if plus else "")


def _interval(row: Row, metric: str) -> str:
    mean, bracket, interval = format_difference(metric, row.differences.get(metric)).partition(" [")
    return f"<b>{mean}</b>" + (f"<br><span class=sd>[{interval}</span>" if bracket else "")


def _seeds(table: Table, colors: dict[str, str]) -> str:
    """Dot plots of the final scores; nothing where every group has one value."""
    if len(table.rows) < 2 and all(len(r.seeds) < 2 for r in table.rows):
        return ""
    cards = []
    for metric in table.metrics[:_MAX_DOTS]:
        values = {row.group: row.values[metric] for row in table.rows}
        if any(values.values()):
            cards.append(_card(metric, svg.dots(values, colors)))
    return f"<h3>Every seed</h3><div class=cards>{''.join(cards)}</div>" if cards else ""


def _card(title: str, content: str) -> str:
    return f"<figure class=card><figcaption>{_prose(title)}</figcaption>{content}</figure>"


def _differences(table: Table, colors: dict[str, str]) -> str:
    rows = [r for r in table.rows if r.differences]
    if table.against is None or not rows:
        return ""
    head = "".join(f"<th class=num>{escape(m)}</th>" for m in table.metrics)
    lines = []
    for row in rows:
        cells = "".join(f"<td class=num>{_interval(row, m)}</td>" for m in table.metrics)
        lines.append(f"<tr><th>{_swatch(row.group, colors)}</th>{cells}</tr>")
    cards = []
    for metric in table.metrics[:_MAX_DOTS]:
        found = {r.group: r.differences[metric] for r in rows if metric in r.differences}
        if found:
            cards.append(_card(metric, svg.differences(found, colors)))
    return (
        f"<h3>Difference to {escape(table.against)}</h3><div class=scroll><table><thead><tr><th>{escape(table.by)}</th>"
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        "<p class=hint>Paired by seed; mean with its 95 % t-interval. Above zero: higher than the baseline.</p>"
        f"<div class=cards>{''.join(cards)}</div>"
    )


def _legend(table: Table, colors: dict[str, str]) -> str:
    if len(table.rows) < 2:
        return ""
    return f"<p class=legend>{''.join(f'<span>{_swatch(r.group, colors)}</span>' for r in table.rows)}</p>"


def _curves(report: TaskReport, colors: dict[str, str]) -> Iterator[str]:
    for title, panels in report.curve_sections():
        cards = []
        for label, metric, x in panels:
            name = label if label == metric else f"{label} `{metric}`"
            cards.append(_card(name, svg.lines(average(report.curves(metric), max_points=160), x, colors)))
        yield f"<h3>{escape(title)}</h3><div class=cards>{''.join(cards)}</div>"


def _first_runs(report: TaskReport) -> list[tuple[str, RunRecord]]:
    return [(group, members[0]) for group, members in report.groups.items()]


def _samples(report: TaskReport) -> str:
    blocks: list[str] = []
    for group, record in _first_runs(report):
        for sheet in record.sheets(_MAX_SAMPLES):
            opened = " open" if group == next(iter(report.groups)) else ""
            title = f"{escape(group)}, seed {record.seed}: {escape(sheet.name)}"
            blocks.append(f"<details{opened}><summary>{title}</summary>{_sheet(sheet)}</details>")
    return f"<h3>Samples</h3>{''.join(blocks)}" if blocks else ""


def _sheet(sheet: Sheet) -> str:
    columns = list(dict.fromkeys(key for row in sheet.rows for key in row))
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    rows = ("".join(f"<td>{escape(row.get(c, ''))}</td>" for c in columns) for row in sheet.rows)
    body = "".join(f"<tr>{cells}</tr>" for cells in rows)
    text = "".join(f"<p class=hint>{_prose(line.strip('*# '))}</p>" for line in sheet.lines)
    table = f"<table class=samples><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class=scroll>{table}</div>{text}"


def _pictures(report: TaskReport) -> str:
    cards = []
    for group, record in _first_runs(report):
        found = sorted(p for d in ("figures", "samples") for p in (record.path / d).glob("*") if p.suffix in _MIME)
        for path in [p for p in found if p.stat().st_size <= _MAX_PICTURE_BYTES][:_MAX_PICTURES]:
            data = base64.b64encode(path.read_bytes()).decode()
            image = f'<img alt="{escape(path.stem)}" src="data:{_MIME[path.suffix]};base64,{data}">'
            cards.append(_card(f"{group}, seed {record.seed}: {path.stem}", image))
    return f"<h3>Pictures</h3><div class=cards>{''.join(cards)}</div>" if cards else ""


def _config(report: TaskReport) -> str:
    """Configuration keys that differ between the groups."""
    rows = config_differences({group: [m.config for m in members] for group, members in report.groups.items()})
    if not rows:
        return ""
    head = "".join(f"<th>{escape(g)}</th>" for g in report.groups)
    body = "".join(
        f"<tr><th><code>{escape(key)}</code></th>{''.join(f'<td>{escape(v)}</td>' for v in values)}</tr>"
        for key, values in rows
    )
    return (
        "<h3>What differs in the configuration</h3><div class=scroll><table class=config><thead><tr><th>key</th>"
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _run_list(report: TaskReport) -> str:
    rows = []
    for record in report.records:
        status = record.text("status", "unknown")
        wall, peak = record.manifest.get("wall_s"), record.manifest.get("peak_mib")
        git = record.manifest.get("git")
        commit = f"{str(git.get('commit', ''))[:9]}{' +' if git.get('dirty') else ''}" if isinstance(git, dict) else "–"
        cells = [
            f"<td><code>{escape(str(record.path))}</code></td>",
            f"<td>{escape(record.text('method', '–'))}</td><td class=num>{record.seed}</td>",
            f"<td><span class='badge {escape(status)}'>{escape(status)}</span></td>",
            f"<td>{escape(record.text('started', '–')[:16].replace('T', ' '))}</td>",
            f"<td class=num>{_duration(wall)}</td>",
            f"<td class=num>{peak:.0f}</td>"
            if isinstance(peak, int | float) and math.isfinite(peak)
            else "<td class=num>–</td>",
            f"<td>{escape(record.text('device', '–'))}</td><td><code>{escape(commit)}</code></td>",
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(
        f"<th{' class=num' if c in ('seed', 'time', 'peak MiB') else ''}>{c}</th>"
        for c in ("folder", "method", "seed", "status", "started", "time", "peak MiB", "device", "commit")
    )
    return (
        f"<h3>Runs</h3><div class=scroll><table class=runs><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}"
        "</tbody></table></div><p class=hint>A + after the commit: files were changed since.</p>"
    )


def _duration(seconds: object) -> str:
    if not isinstance(seconds, int | float):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
