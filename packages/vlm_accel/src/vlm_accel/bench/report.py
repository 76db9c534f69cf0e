"""From the records of a bench to a table, CSV and JSON. No torch."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polymodal.files import write_text
from polymodal.tables import markdown

__all__ = ["columns_for", "main_metric", "print_table", "table_rows", "to_markdown", "write_results"]

Record = Mapping[str, Any]
Column = tuple[str, Callable[[Record], float | None], str]
"""heading, value, format"""


def main_metric(records: Sequence[Record]) -> str:
    """Full name of the metric that rows are ranked by: the first of the unmodified model."""
    return next((name for name in records[0]["metrics"] if name.startswith("test/")), "fidelity/agreement")


def columns_for(records: Sequence[Record]) -> list[Column]:
    """Columns of the table; those that no row has are left out."""
    main = main_metric(records)
    full = records[0]["metrics"]

    def value(name: str, factor: float = 1.0) -> Callable[[Record], float | None]:
        return lambda row: None if row["metrics"].get(name) is None else factor * row["metrics"][name]

    def share(name: str) -> Callable[[Record], float | None]:
        return lambda row: (
            100 * row["metrics"][name] / full[name] if full.get(name) and name in row["metrics"] else None
        )

    in_percent = main.endswith(("accuracy", "agreement"))
    columns: list[Column] = [
        (f"{main.removeprefix('test/')}" + (" %" if in_percent else ""), value(main, 100 if in_percent else 1), ".1f")
    ]
    columns.append(("retained %", value("test/retained"), ".1f"))
    columns += [
        ("KL", value("fidelity/kl"), ".3f"),
        ("same argmax %", value("fidelity/agreement", 100), ".1f"),
        ("never diverged %", value("fidelity/undiverged", 100), ".0f"),
        ("tokens left %", value("tokens/left_share", 100), ".0f"),
        ("mean layer %", value("tokens/mean_share", 100), ".0f"),
        ("MACs %", share("macs/total"), ".0f"),
        ("KV bytes %", share("kv/bytes"), ".0f"),
    ]
    for part in ("vision", "prefill", "token"):
        columns.append((f"{part} ms", value(f"time/{part}_ms"), ".2f"))
    for part in ("vision", "prefill", "token"):
        columns.append((f"{part} speed-up", value(f"speedup/{part}"), ".2f"))
        columns.append((f"{part} ideal", value(f"ideal/{part}_speedup"), ".2f"))
        columns.append((f"{part} measured/ideal", value(f"efficiency/{part}"), ".2f"))
    return [column for column in columns if any(column[1](row) is not None for row in records)]


def table_rows(records: Sequence[Record], columns: Sequence[Column]) -> list[list[str]]:
    """Cells as text; a row that was refused says so in its first column."""
    rows = []
    for record in records:
        values = [read(record) for _, read, _ in columns]
        forms = [form for _, _, form in columns]
        cells = ["–" if value is None else format(value, form) for value, form in zip(values, forms, strict=True)]
        if record["error"]:
            cells = ["refused", *["–"] * (len(columns) - 1)]
        rows.append([record["label"], *cells])
    return rows


def to_markdown(records: Sequence[Record], title: str, notes: Sequence[str] = ()) -> str:
    """Heading, table, notes."""
    columns = columns_for(records)
    table = markdown(["row", *(name for name, _, _ in columns)], table_rows(records, columns))
    refused = [f"- {row['label']} was refused: {row['error']}" for row in records if row["error"]]
    lines = "\n".join([*(f"- {note}" for note in notes), *refused])
    return f"### {title}\n\n{table}\n\n{lines}\n"


_SHOWN = (
    *("KL", "same argmax %", "tokens left %", "MACs %", "KV bytes %", "prefill ms", "token ms"),
    *("vision speed-up", "prefill speed-up", "prefill ideal", "token speed-up"),
)
_GROUPS = ("full", "vision", "features", "llm", "cache")


def print_table(records: Sequence[Record], title: str) -> None:
    """The most telling columns on the terminal, rows by where they act; ``table.md`` and ``results.csv`` have all."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = columns_for(records)
    shown = [column for number, column in enumerate(columns) if number == 0 or column[0] in _SHOWN]
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("row", no_wrap=True)
    for name, _, _ in shown:
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    ordered = sorted(records, key=lambda row: _GROUPS.index(row["group"]) if row["group"] in _GROUPS else len(_GROUPS))
    for record, cells, after in zip(ordered, table_rows(ordered, shown), [*ordered[1:], None], strict=True):
        table.add_row(*cells, end_section=after is not None and after["group"] != record["group"])
    width = max(130, shutil.get_terminal_size((130, 40)).columns)
    Console(file=sys.stdout, width=width, highlight=False).print(table)


def write_results(folder: Path, records: Sequence[Record], title: str, notes: Sequence[str]) -> None:
    """``results.json`` (all), ``results.csv`` (a line a row, every figure), ``table.md``."""
    write_text(folder / "results.json", json.dumps(list(records), indent=1, ensure_ascii=False) + "\n")
    names = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "method", "group", "seed", "status", *names])
    for record in records:
        head = [record[key] for key in ("label", "method", "group", "seed", "status")]
        writer.writerow([*head, *(record["metrics"].get(name, "") for name in names)])
    write_text(folder / "results.csv", text.getvalue())
    write_text(folder / "table.md", to_markdown(records, title, notes))
