"""Reading run folders back: manifest, configuration, curves and samples, whatever state a run was left in."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from polymodal.errors import UserError

__all__ = ["MIGRATIONS", "SCHEMA_VERSION", "Point", "RunRecord", "Sheet", "find_runs", "flatten", "read_run"]

SCHEMA_VERSION = 1
"""Version of ``manifest.json`` that this polymodal writes."""

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Step from one manifest version to the next: version -> function of the manifest. Version 1 is the first."""

_MAX_JSON_BYTES = 64 * 2**20
_NOT_SEARCHED = frozenset({"checkpoints", "wandb", "samples", "figures", "tensorboard", "report"})
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One value of a curve; ``epoch`` is ``None`` where the row has none."""

    step: int
    epoch: int | None
    value: float


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys; lists stay values, empty mappings stay ``{}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


@dataclass(frozen=True)
class Sheet:
    """A table that a run left behind, and the lines that stand around it.

    Args:
        name: file name without its ending.
        rows: column -> cell text.
        lines: text outside the table, Markdown marks included.
    """

    name: str
    rows: list[dict[str, str]]
    lines: list[str]


@dataclass(frozen=True)
class RunRecord:
    """One run folder, read only.

    Args:
        path: the run folder.
        manifest: ``manifest.json``, migrated to ``SCHEMA_VERSION``.
    """

    path: Path
    manifest: Mapping[str, Any]

    def text(self, key: str, default: str = "") -> str:
        """Entry ``key`` of the manifest as text; ``default`` where it is missing or null."""
        value = self.manifest.get(key)
        return default if value is None else str(value)

    @property
    def seed(self) -> int:
        """Root seed; 0 where the manifest has none."""
        value = self.manifest.get("seed")
        return int(value) if isinstance(value, int | float) else 0

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.manifest.get("status") == "finished"

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data; empty where the run recorded none."""
        data = self.manifest.get("data")
        return str(data.get("fingerprint") or "") if isinstance(data, Mapping) else ""

    @property
    def signatures(self) -> dict[str, str]:
        """Metric name -> signature of its definition."""
        value = self.manifest.get("metric_signatures")
        return {str(k): str(v) for k, v in value.items()} if isinstance(value, Mapping) else {}

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Final metrics; for a run without any, the last value of each curve."""
        value = self.manifest.get("metrics")
        final = _numbers(value) if isinstance(value, Mapping) else {}
        return final or {name: points[-1].value for name, points in self.curves.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.yaml`` as dotted keys; empty if it is missing or unreadable (logged)."""
        path = self.path / "config.yaml"
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            _log.warning("%s cannot be read and is left out: %s", path, str(error).splitlines()[0])
            return {}
        return flatten(tree) if isinstance(tree, Mapping) else {}

    @cached_property
    def curves(self) -> dict[str, list[Point]]:
        """Curves of ``metrics.csv`` by metric name, sorted by step; the last value of a repeated step counts.

        Rows that are not complete (the line a killed run was writing) are left out.
        """
        by_name: dict[str, dict[int, Point]] = {}
        path = self.path / "metrics.csv"
        try:
            with path.open(encoding="utf-8", errors="replace", newline="") as lines:
                for row in csv.reader(_whole_lines(lines)):
                    point = _point(row)
                    if point is not None:
                        by_name.setdefault(row[2], {})[point.step] = point
        except FileNotFoundError:
            pass
        except (OSError, csv.Error) as error:
            _log.warning("%s cannot be read to its end: %s", path, error)
        return {name: [points[step] for step in sorted(points)] for name, points in by_name.items()}

    def lookup(self, key: str) -> Any:
        """Value of a dotted key: manifest first, then config; ``None`` where neither has it."""
        return self._facts[key] if key in self._facts else self.config.get(key)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """The manifest as dotted keys."""
        return flatten(self.manifest)

    def sheets(self, limit: int = 20) -> list[Sheet]:
        """Tables of the run: ``*.md`` in the folder, then ``*.jsonl`` and ``*.md`` in ``samples/``.

        Args:
            limit: most rows of each.
        """
        paths = sorted(self.path.glob("*.md"))
        paths += sorted(p for p in (self.path / "samples").glob("*") if p.suffix in (".jsonl", ".md"))
        found = []
        for path in paths:
            try:
                lines = [x for x in path.read_text(encoding="utf-8", errors="replace").splitlines() if x.strip()]
            except OSError as error:
                _log.warning("%s cannot be read and is left out: %s", path, error)
                continue
            rows, text = _json_rows(lines) if path.suffix == ".jsonl" else _markdown_rows(lines)
            if rows:
                found.append(Sheet(path.stem, rows[:limit], text))
        return found


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(k): float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _whole_lines(lines: Iterator[str]) -> Iterator[str]:
    """Lines that end with a line break: a last line without one was cut off while it was written."""
    return (line.replace("\0", "") for line in lines if line.endswith("\n"))


def _point(row: Sequence[str]) -> Point | None:
    if len(row) != 4 or row[0] == "step":
        return None
    try:
        point = Point(int(float(row[0])), int(float(row[1])) if row[1] else None, float(row[3]))
    except (ValueError, OverflowError):
        return None
    return point if math.isfinite(point.value) else None


def _json_rows(lines: Sequence[str]) -> tuple[list[dict[str, str]], list[str]]:
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line a killed run was writing
            continue
        if isinstance(row, dict):
            rows.append({str(k): _cell(v) for k, v in row.items()})
    return rows, []


def _markdown_rows(lines: Sequence[str]) -> tuple[list[dict[str, str]], list[str]]:
    """Rows of the first table, and the lines that belong to no table."""
    cells = [[c.strip() for c in line.strip().strip("|").split("|")] for line in lines if line.lstrip().startswith("|")]
    text = [line for line in lines if not line.lstrip().startswith("|")]
    return [dict(zip(cells[0], values, strict=False)) for values in cells[2:]] if len(cells) > 2 else [], text


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_run(path: Path) -> RunRecord:
    """Read one run folder.

    Args:
        path: the run folder, or its ``manifest.json``.

    Raises:
        UserError: no manifest there, a manifest cut off while it was written, or one of a newer schema.
    """
    folder = path.parent if path.name == "manifest.json" else path
    file = folder / "manifest.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a run folder: it has no manifest.json{_hint(folder)}")
    record = _read_manifest(file)
    if isinstance(record, str):
        raise UserError(f"{file}: {record}")
    return record


def _hint(folder: Path) -> str:
    nested = sorted(folder.glob("**/manifest.json"), key=lambda p: p.stat().st_mtime)[-1:] if folder.is_dir() else []
    return f"; the newest one below it is {nested[0].parent}" if nested else ""


def _read_manifest(file: Path) -> RunRecord | str:
    """The record, or why there is none. A newer schema is the one thing that must not be passed over."""
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            return "larger than 64 MiB, not a run manifest"
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        return f"cannot be read ({error})"
    except json.JSONDecodeError as error:
        return f"not valid JSON at line {error.lineno}: cut off while it was written?"
    if (
        not isinstance(tree, dict)
        or "schema_version" not in tree
        or tree.get("schema", "polymodal.run") != "polymodal.run"
    ):
        return "not the manifest of a run"
    return RunRecord(file.parent, _migrate(tree, file))


def _migrate(tree: dict[str, Any], file: Path) -> dict[str, Any]:
    version = tree["schema_version"]
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise UserError(
            f"{file}: schema version {version}; this polymodal reads up to {SCHEMA_VERSION}: install a newer polymodal"
        )
    while version < SCHEMA_VERSION:
        if version not in MIGRATIONS:
            raise UserError(f"{file}: schema version {version} was never released; expected 1 to {SCHEMA_VERSION}")
        tree = MIGRATIONS[version](dict(tree))
        version += 1
    return {**tree, "schema_version": version}


def find_runs(roots: Sequence[Path]) -> tuple[list[RunRecord], list[str]]:
    """All runs below some folders, in the order they were started.

    Args:
        roots: run folders or folders of run folders.

    Returns:
        The runs, and one line for each manifest that could not be read.

    Raises:
        UserError: a root does not exist, or a manifest has a newer schema.
    """
    records: dict[Path, RunRecord] = {}
    skipped: list[str] = []
    for root in roots:
        if not root.is_dir():
            raise UserError(f"no such folder: {root}; give a run folder or a folder of runs, e.g. runs/")
        for file in _manifests(root):
            record = _read_manifest(file)
            if isinstance(record, str):
                skipped.append(f"{file}: {record}; left out")
            else:
                records[file.resolve()] = record
    ordered = sorted(records.values(), key=lambda r: (r.text("started"), str(r.path)))
    return ordered, skipped


def _manifests(root: Path) -> Iterator[Path]:
    """Manifests below ``root``; a run folder's own subfolders are not searched."""
    for folder, names, files in os.walk(root):
        if "manifest.json" in files:
            yield Path(folder) / "manifest.json"
        names[:] = sorted(n for n in names if n not in _NOT_SEARCHED and not n.startswith("."))
