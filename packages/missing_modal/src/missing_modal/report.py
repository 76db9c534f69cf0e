"""What a run ends in: scores by pattern before and after calibration, as a file and as a table. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError
from polymodal.files import write_json
from polymodal.tables import markdown

from missing_modal.metrics import probabilities, score_samples, summarise
from missing_modal.patterns import all_masks, mask_name

if TYPE_CHECKING:
    from missing_modal.calibration import Temperatures
    from missing_modal.data.base import Task
    from missing_modal.records import Packed

__all__ = [
    "REPORT_FILE",
    "SCHEMA_VERSION",
    "PatternScores",
    "Report",
    "calibration_line",
    "closing_table",
    "make_report",
    "read_report",
    "sample_rows",
    "write_report",
]

SCHEMA_VERSION = 1
REPORT_FILE = "report.json"
ALL = "all"
_DASH = "–"
_FEW = 50
"""validation samples below which the closing line says that temperatures rest on few"""
_SHOWN: dict[str, tuple[str, ...]] = {
    "multiclass": ("accuracy",),
    "binary": ("accuracy", "auroc"),
    "multilabel": ("f1_macro", "f1_micro"),
}
_SHARES = ("accuracy", "auroc", "f1_macro", "f1_micro", "f1_samples", "f1_weighted", "ece")
"""0..1, shown in percent"""


@dataclass(frozen=True)
class PatternScores:
    """Scores of the samples of one pattern.

    Args:
        pattern: its name; ``all``: all samples.
        samples: how many.
        scores: by name, see ``metrics.summarise``; those that are not defined are left out.
        calibrated: ``nll``, ``brier``, ``ece`` of the same samples at their temperatures; empty without calibration.
        temperature: of the pattern; None for ``all`` and without calibration.
    """

    pattern: str
    samples: int
    scores: dict[str, float]
    calibrated: dict[str, float]
    temperature: float | None = None


@dataclass(frozen=True)
class Report:
    """Scores of one model on one split.

    Args:
        method: its name.
        data: name of the data set.
        split: which samples.
        task: multiclass, multilabel, binary.
        missing: what the split lacks, for the caption, e.g. ``both, 70 % of the rows``.
        rows: ``all`` first, then the patterns that occur.
        fitted_on: validation samples that the temperatures were fitted on, 0 without calibration.
    """

    method: str
    data: str
    split: str
    task: Task
    missing: str
    rows: tuple[PatternScores, ...]
    fitted_on: int = 0

    def of(self, pattern: str) -> PatternScores:
        """The row of a pattern.

        Raises:
            KeyError: no sample has it.
        """
        return {row.pattern: row for row in self.rows}[pattern]

    def to_json(self) -> dict[str, Any]:
        """Content of ``report.json``."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Report:
        """The report that ``to_json`` wrote.

        Raises:
            UserError: written by a newer version, or something else.
        """
        if stored.get("schema_version", 0) > SCHEMA_VERSION:
            raise UserError("the report was written by a newer version; update polymodal-missing-modal")
        try:
            facts = {key: value for key, value in stored.items() if key not in ("schema_version", "rows")}
            return cls(**facts, rows=tuple(PatternScores(**row) for row in stored["rows"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"not a report of missing_modal: {error}; evaluate the model again with mm-eval") from error


def make_report(
    packed: Packed,
    temperatures: Temperatures | None,
    *,
    task: Task,
    modalities: Sequence[str],
    **facts: Any,
) -> Report:
    """Scores by pattern.

    Args:
        packed: logits, labels and patterns of the split.
        temperatures: fitted on other samples, or None.
        task: multiclass, multilabel, binary.
        modalities: in the order of the bits.
        facts: ``method``, ``data``, ``split``, ``missing``, ``fitted_on`` of the report.
    """
    plain = score_samples(packed.logits, packed.labels, task)
    scaled = None
    if temperatures is not None:
        scaled = score_samples(temperatures.scale(packed.logits, packed.masks), packed.labels, task)
    rows = []
    chosen: dict[str, Any] = {ALL: packed.masks == packed.masks}
    for mask in all_masks(modalities):
        if (packed.masks == mask).any():
            chosen[mask_name(mask, modalities)] = packed.masks == mask
    for name, held in chosen.items():
        after = {} if scaled is None else _defined(summarise(scaled.take(held)))
        after = {key: value for key, value in after.items() if key in ("nll", "brier", "ece")}
        single = temperatures is not None and name != ALL
        degree = float(temperatures.of(packed.masks[held][:1])[0]) if single and temperatures is not None else None
        rows.append(PatternScores(name, int(held.sum()), _defined(summarise(plain.take(held))), after, degree))
    return Report(task=task, rows=tuple(rows), **facts)


def _defined(found: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if not math.isnan(value)}


def write_report(folder: Path, report: Report) -> None:
    """Write ``report.json`` into a run folder."""
    write_json(folder / REPORT_FILE, report.to_json())


def read_report(folder: Path) -> Report:
    """The report of a run folder.

    Raises:
        UserError: no report there, or a damaged one.
    """
    path = folder / REPORT_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a finished run of mm-train") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); evaluate the model again with mm-eval") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path}: expected an object, found {type(stored).__name__}; evaluate the model again")
    return Report.from_json(stored)


# ------------------------------------------------------------------ what is printed


def closing_table(report: Report) -> str:
    """An aligned Markdown table, one line a pattern, with a line of explanation."""
    shown = _SHOWN[report.task]
    header = ["present", "samples", *shown, "nll", "ece"]
    if report.fitted_on:
        header += ["T", "nll at T", "ece at T"]
    rows = []
    for row in report.rows:
        cells = [row.pattern, f"{row.samples}", *(_number(row.scores, name) for name in (*shown, "nll", "ece"))]
        if report.fitted_on:
            cells.append(_DASH if row.temperature is None else f"{row.temperature:.2f}")
            cells += [_number(row.calibrated, name) for name in ("nll", "ece")]
        rows.append(cells)
    words = f"{report.method} on {report.data}, {report.split} split, missing: {report.missing}."
    percent = ", ".join((*shown, "ece"))
    return markdown(header, rows) + f"\n\n{words} In percent: {percent}.\n"


def _number(found: Mapping[str, float], name: str) -> str:
    if name not in found:
        return _DASH
    return f"{100 * found[name]:.1f}" if name in _SHARES else f"{found[name]:.3f}"


def calibration_line(report: Report) -> str:
    """What the temperatures did to the test probabilities, in one line."""
    if not report.fitted_on:
        return "calibration: none (no validation samples, or calibration.enabled=false); probabilities are as trained"
    row = report.of(ALL)
    degrees = ", ".join(f"{r.pattern} {r.temperature:.2f}" for r in report.rows if r.temperature is not None)
    ece = f"ece {100 * row.scores['ece']:.1f} -> {100 * row.calibrated['ece']:.1f} %"
    nll = f"nll {row.scores['nll']:.3f} -> {row.calibrated['nll']:.3f}"
    few = ": few, trust them little" if report.fitted_on < _FEW else ""
    return f"calibration: {ece}, {nll} (temperatures: {degrees}; fitted on {report.fitted_on} validation samples{few})"


def sample_rows(
    packed: Packed,
    temperatures: Temperatures | None,
    *,
    task: Task,
    modalities: Sequence[str],
    names: Sequence[str],
    each: int = 4,
) -> tuple[list[str], list[list[Any]]]:
    """A few predictions of each pattern, for the sample table: columns, rows.

    Args:
        packed: logits, labels and patterns of the split.
        temperatures: of the probabilities, or None.
        task: multiclass, multilabel, binary.
        modalities: in the order of the bits.
        names: of the classes.
        each: the first so many samples of a pattern.
    """
    logits = packed.logits if temperatures is None else temperatures.scale(packed.logits, packed.masks)
    found = probabilities(logits, task)
    rows: list[list[Any]] = []
    for mask in all_masks(modalities):
        for number in [i for i, held in enumerate(packed.masks) if held == mask][:each]:
            p, label = found[number], packed.labels[number]
            if task == "multilabel":
                true = ", ".join(name for name, on in zip(names, label, strict=True) if on)
                guess = ", ".join(name for name, value in zip(names, p, strict=True) if value >= 0.5)
                sure = float(p.max())
            else:
                true, guess, sure = names[int(label)], names[int(p.argmax())], float(p.max())
            rows.append([packed.ids[number], mask_name(mask, modalities), true, guess, round(sure, 4)])
    return ["id", "present", "truth", "prediction", "probability"], rows
