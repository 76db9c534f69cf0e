"""`polymodal compare A B [C ...]`: what differs between runs, configuration and metrics side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymodal.errors import UserError
from polymodal.run_reader import RunRecord, read_run
from polymodal.tables import decimals, markdown

__all__ = ["Comparison", "compare", "config_differences"]

_PLACES = frozenset({"out", "name", "resume"})
"""Configuration keys that say where and under which name a run is kept; they change nothing that is measured."""

_MISSING = "–"


@dataclass(frozen=True)
class Comparison:
    """Differences of runs, in the order given.

    Args:
        runs: what was compared.
        config: key and one value a run, for keys that differ.
        facts: the same for the manifest: method, device, versions, commit.
        metrics: final metrics: name and one value a run (``None`` where a run has none).
        warnings: why the metrics should not be compared, if so.
    """

    runs: tuple[RunRecord, ...]
    config: list[tuple[str, list[str]]]
    facts: list[tuple[str, list[str]]]
    metrics: list[tuple[str, list[float | None]]]
    warnings: list[str]

    def to_markdown(self) -> str:
        """Runs, warnings, differences and metrics as Markdown; with two runs also their difference."""
        letters = _letters(len(self.runs))
        parts = [
            "\n".join(
                f"- {letter}: {r.path} ({r.text('method', 'no method')}, seed {r.seed}, {r.text('status', 'unknown')})"
                for letter, r in zip(letters, self.runs, strict=True)
            )
        ]
        if self.warnings:
            parts.append("\n".join(f"- warning: {w}" for w in self.warnings))
        parts.append("### Configuration\n\n" + _side_by_side(letters, self.config, "the configurations are equal"))
        parts.append("### Circumstances\n\n" + _side_by_side(letters, self.facts, "nothing differs"))
        header = ["metric", *letters] + (["B − A"] if len(self.runs) == 2 else [])
        rows = [[name, *_numbers(name, values)] for name, values in self.metrics]
        parts.append("### Metrics\n\n" + (markdown(header, rows) if rows else "no run has a metric yet"))
        return "\n\n".join(parts) + "\n"


def compare(paths: Sequence[Path]) -> Comparison:
    """Compare run folders.

    Args:
        paths: two run folders or more.

    Raises:
        UserError: fewer than two, or one that is not a run folder.
    """
    if len(paths) < 2:
        raise UserError(f"{len(paths)} run given; expected two or more run folders")
    runs = tuple(read_run(path) for path in paths)
    configs = {str(i): [r.config] for i, r in enumerate(runs)}
    names = list(dict.fromkeys(name for r in runs for name in sorted(r.metrics)))
    return Comparison(
        runs=runs,
        config=config_differences(configs),
        facts=config_differences({str(i): [_facts(r)] for i, r in enumerate(runs)}),
        metrics=[(name, [r.metrics.get(name) for r in runs]) for name in names],
        warnings=_warnings(runs, names),
    )


def config_differences(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, list[str]]]:
    """Keys whose values differ between groups of flat configurations.

    Args:
        groups: label -> the flattened configurations of its runs.

    Returns:
        (key, one text a group) sorted by key; several values of one group are joined by commas, a dash is a missing
        key. Keys that only name places (``out``, ``name``, ``resume``) are left out.
    """
    keys = {key for configs in groups.values() for config in configs for key in config} - _PLACES
    rows = []
    for key in sorted(keys):
        texts = []
        for configs in groups.values():
            found = dict.fromkeys(_text(c[key]) if key in c else _MISSING for c in configs)
            texts.append(", ".join(sorted(found)))
        if len(set(texts)) > 1:
            rows.append((key, texts))
    return rows


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _facts(run: RunRecord) -> dict[str, Any]:
    git = run.manifest.get("git")
    versions = run.manifest.get("versions")
    facts: dict[str, Any] = {
        key: run.manifest.get(key) for key in ("task", "method", "fidelity", "status", "device", "precision", "threads")
    }
    if isinstance(git, Mapping):
        facts["commit"] = f"{str(git.get('commit', ''))[:12]}{' (files changed)' if git.get('dirty') else ''}"
    if isinstance(versions, Mapping):
        facts.update({f"version of {name}": version for name, version in versions.items()})
    facts["data"] = run.lookup("data.name")
    facts["data fingerprint"] = run.fingerprint[:12]
    return facts


def _warnings(runs: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    warnings = []
    letters = _letters(len(runs))
    if len({r.fingerprint for r in runs}) > 1:
        parts = [f"{x} {r.fingerprint[:12] or 'none'}" for x, r in zip(letters, runs, strict=True)]
        warnings.append(f"the data differ ({', '.join(parts)}): their scores are not comparable")
    for name in names:
        found = {r.signatures.get(name, "none") for r in runs if name in r.metrics}
        if len(found) > 1:
            warnings.append(f"{name} is defined differently: {' | '.join(sorted(found))}")
    unfinished = [x for x, r in zip(letters, runs, strict=True) if not r.finished]
    if unfinished:
        warnings.append(f"{', '.join(unfinished)} did not finish: the values are the last ones logged")
    return warnings


def _letters(count: int) -> list[str]:
    """A, B, ... Z, then run27 and so on."""
    return [chr(ord("A") + i) if i < 26 else f"run{i + 1}" for i in range(count)]


def _side_by_side(letters: Sequence[str], rows: Sequence[tuple[str, list[str]]], none: str) -> str:
    if not rows:
        return none
    return markdown(["key", *letters], [[key, *(_shorten(v) for v in values)] for key, values in rows])


def _shorten(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _numbers(name: str, values: Sequence[float | None]) -> list[str]:
    digits = max((decimals(name, v) for v in values if v is not None), default=4)
    texts = [_MISSING if v is None else f"{v:.{digits}f}" for v in values]
    if len(values) == 2:
        first, second = values
        texts.append(_MISSING if first is None or second is None else f"{second - first:+.{digits}f}")
    return texts
