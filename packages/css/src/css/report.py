"""Scores after each step of a continual task: one report a step, files of its folder, and the table at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from polymodal.errors import UserError
from polymodal.files import write_json, write_text
from polymodal.tables import markdown

from css import metrics
from css.task import Task

__all__ = [
    "SCHEMA_VERSION",
    "SCORES",
    "ClassScore",
    "StepReport",
    "class_table",
    "closing_table",
    "over_steps",
    "read_confusion",
    "read_report",
    "read_reports",
    "write_confusion",
    "write_report",
]

SCHEMA_VERSION = 1
MAX_ROWS = 40
"""More classes than this are printed as the means of the classes of each step."""
REPORT_FILE, CONFUSION_FILE = "report.json", "confusion.json"
SCORES = ("old", "new", "all", "harmonic")
_DASH = "–"


@dataclass(frozen=True)
class ClassScore:
    """IoU of one class.

    Args:
        name: of the class.
        raw: id in the masks on disk.
        channel: place in learning order, from 1.
        step: step that brought it.
        iou: percent; 0 where the class occurs neither in truth nor in prediction.
    """

    name: str
    raw: int
    channel: int
    step: int
    iou: float


@dataclass(frozen=True)
class StepReport:
    """Scores on the test pictures after one step, all in percent.

    Args:
        step: continual step, from 0.
        task: name of the task.
        classes: every class seen so far, in learning order.
        background_iou: IoU of the background.
        old: mean over the background and the classes of step 0.
        new: mean over the classes of later steps; NaN in step 0.
        all: mean over the background and all classes seen.
        harmonic: harmonic mean of old and new; NaN in step 0.
        images: number of test pictures.
        confusion: (S, S) int64, rows truth; None where only the scores were read.
    """

    step: int
    task: str
    classes: tuple[ClassScore, ...]
    background_iou: float
    old: float
    new: float
    all: float
    harmonic: float
    images: int = 0
    confusion: np.ndarray | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        confusion: np.ndarray,
        task: Task,
        names: Sequence[str],
        step: int,
        base: int | None = None,
        images: int = 0,
    ) -> StepReport:
        """Scores of a confusion matrix.

        Args:
            confusion: (S, S) counts, rows truth; S - 1 classes in learning order and the background.
            task: which classes belong to which step. Joint training has all classes in its only step; it is reported
                with the steps of the continual task that it is compared with.
            names: class names by raw id: ``names[raw - 1]``.
            step: the step after which the pictures were segmented.
            base: number of base classes; default: those of the task.
            images: number of pictures.

        Raises:
            ValueError: a matrix that is not square or has more classes than the task.
        """
        matrix = np.asarray(confusion)
        channels = len(matrix)
        if matrix.shape != (channels, channels) or not 1 <= channels <= task.num_classes + 1:
            raise ValueError(f"confusion matrix {matrix.shape}; expected (S, S), 1 <= S <= {task.num_classes + 1}")
        base = min(task.num_channels(0) - 1 if base is None else base, channels - 1)
        scores = metrics.segmentation_report(matrix, base, channels - 1 - base)
        iou = [float(value) for value in scores["classes"]]
        classes = tuple(
            ClassScore(names[task.raw(channel) - 1], task.raw(channel), channel, origin, iou[channel])
            for origin in range(task.num_steps)
            for channel in task.channels(origin)
            if channel < channels
        )
        means = {key: float(scores[key]) for key in SCORES}
        return cls(step, task.name, classes, iou[0], **means, images=images, confusion=matrix)

    @property
    def iou(self) -> np.ndarray:
        """(S,) percent by channel, background first."""
        return np.array([self.background_iou, *(score.iou for score in self.classes)])

    def metrics(self) -> dict[str, float]:
        """``miou_old``, ``miou_new``, ``miou_all``, ``miou_harmonic``, without those that the step does not have."""
        values = {f"miou_{key}": getattr(self, key) for key in SCORES}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def to_json(self) -> dict[str, Any]:
        """Content of ``report.json``; a score that the step does not have is null."""
        scores = {key: _or_none(getattr(self, key)) for key in SCORES}
        return {
            "schema_version": SCHEMA_VERSION,
            "step": self.step,
            "task": self.task,
            "classes": [vars(score) for score in self.classes],
            "background_iou": self.background_iou,
            **scores,
            "images": self.images,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], confusion: np.ndarray | None = None) -> StepReport:
        """The report that ``to_json`` wrote.

        Raises:
            UserError: written by a newer version, or something else.
        """
        if stored.get("schema_version", 0) > SCHEMA_VERSION:
            raise UserError("the report was written by a newer version; update polymodal-css")
        try:
            classes = tuple(ClassScore(**score) for score in stored["classes"])
            old, new, every, harmonic = (_or_nan(stored[key]) for key in SCORES)
            step, task, background = int(stored["step"]), str(stored["task"]), float(stored["background_iou"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a report of css: {error}; evaluate the step again with css-eval") from error
        return cls(step, task, classes, background, old, new, every, harmonic, int(stored.get("images", 0)), confusion)


def write_report(folder: Path, report: StepReport, confusion: np.ndarray | None = None) -> None:
    """Write ``report.json`` and ``confusion.json`` into a step folder.

    Args:
        folder: it must exist.
        report: the scores.
        confusion: (S, S) counts; default: those of the report.
    """
    matrix = report.confusion if confusion is None else confusion
    if matrix is not None:
        write_confusion(folder / CONFUSION_FILE, matrix)
    write_json(folder / REPORT_FILE, report.to_json())


def read_report(folder: Path) -> StepReport:
    """The report of a step folder, with its confusion matrix where that is there.

    Raises:
        UserError: no report there, or a damaged one.
    """
    path, matrix = folder / REPORT_FILE, folder / CONFUSION_FILE
    stored = _read_json(path)
    confusion = read_confusion(matrix) if matrix.is_file() else None
    try:
        return StepReport.from_json(stored, confusion)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_reports(steps: Path) -> list[StepReport]:
    """Reports of all finished steps below ``run.folder/steps``, in their order."""
    return [read_report(path.parent) for path in sorted(steps.glob(f"*/{REPORT_FILE}"))]


# ------------------------------------------------------------------ confusion matrix


def write_confusion(path: Path, confusion: np.ndarray) -> None:
    """Write a confusion matrix (S, S), rows truth, one line a row."""
    matrix = np.asarray(confusion)
    rows = ",\n  ".join(json.dumps(row) for row in matrix.tolist())
    head = f'{{\n "schema_version": {SCHEMA_VERSION},\n "channels": {len(matrix)},\n "matrix": [\n  '
    write_text(path, f"{head}{rows}\n ]\n}}\n")


def read_confusion(path: Path) -> np.ndarray:
    """The (S, S) int64 matrix that ``write_confusion`` wrote.

    Raises:
        UserError: missing or damaged.
    """
    stored = _read_json(path)
    try:
        matrix = np.asarray(stored["matrix"], dtype=np.int64)
        square = matrix.shape == (stored["channels"], stored["channels"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no confusion matrix ({error}); evaluate the step again with css-eval") from error
    if not square:
        raise UserError(f"{path}: matrix of shape {matrix.shape}; evaluate the step again with css-eval")
    return matrix


def _read_json(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a finished step") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); evaluate the step again with css-eval") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path}: expected an object, found {type(stored).__name__}")
    return stored


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


# ------------------------------------------------------------------ over steps


def over_steps(reports: Sequence[StepReport]) -> dict[str, float]:
    """What only several steps have: ``forgetting`` (mean over the classes of earlier steps) and ``miou_avg``.

    Args:
        reports: of the steps in their order, at least one.

    Returns:
        ``miou_avg``, the mean over steps of ``all``; from the second step on also ``forgetting``. Points of percent.

    Source: eir.md 4.3.
    """
    found = {"miou_avg": metrics.average_over_steps([report.all for report in reports])}
    if len(reports) > 1:
        found["forgetting"] = metrics.mean_forgetting([report.iou for report in reports])
    return found


def closing_table(reports: Sequence[StepReport]) -> str:
    """IoU of every class after each step, then old, new, all, harmonic; forgetting in the last column.

    Args:
        reports: of the steps in their order; at least one.

    Returns:
        An aligned Markdown table with a line of explanation. Beyond 40 classes a row is the mean of a step's classes.
    """
    last, lost = reports[-1], metrics.forgetting([report.iou for report in reports])
    header = ["class", "learnt in", *(f"after {report.step}" for report in reports)]
    rows = [["background", _DASH, *(_percent(report.background_iou) for report in reports)]]
    groups = _row_groups(last)
    for name, origin, channels in groups:
        rows.append([name, str(origin), *(_percent(_mean(report.iou, channels)) for report in reports)])
    scores = [[key, _DASH, *(_percent(getattr(report, key)) for report in reports)] for key in SCORES]
    notes = ["IoU in percent; old: background and base classes; all: background and all classes seen."]
    if len(reports) > 1:
        header.append("forgetting")
        rows = [
            [*row, _percent(_mean(lost, channels))]
            for row, channels in zip(rows, [(0,), *(channels for _, _, channels in groups)], strict=True)
        ]
        summary = over_steps(reports)
        scores = [[*row, _percent(summary["forgetting"]) if row[0] == "all" else _DASH] for row in scores]
        notes.append(
            f"forgetting: best earlier IoU - final IoU; its mean over the {len(lost) - 1} classes of earlier steps "
            f"stands in row all. Average of all over steps: {summary['miou_avg']:.1f}."
        )
    return markdown(header, rows + scores) + "\n\n" + "\n".join(notes) + "\n"


def class_table(report: StepReport) -> str:
    """IoU of every class after one step, and the means: an aligned Markdown table."""
    rows = [["background", "0", _DASH, _percent(report.background_iou)]]
    rows += [[score.name, str(score.raw), str(score.step), _percent(score.iou)] for score in report.classes]
    rows += [[key, _DASH, _DASH, _percent(getattr(report, key))] for key in SCORES]
    return markdown(["class", "id", "learnt in", "IoU (%)"], rows) + "\n"


def _row_groups(report: StepReport) -> list[tuple[str, int, Sequence[int]]]:
    """(text, step, channels) of each row between background and the means."""
    if len(report.classes) <= MAX_ROWS:
        return [(score.name, score.step, (score.channel,)) for score in report.classes]
    steps: dict[int, list[int]] = {}
    for score in report.classes:
        steps.setdefault(score.step, []).append(score.channel)
    return [(f"step {step}: {len(channels)} classes", step, channels) for step, channels in steps.items()]


def _mean(iou: np.ndarray, channels: Sequence[int]) -> float:
    """Mean over channels; NaN where they were not known yet."""
    return float(np.mean(iou[list(channels)])) if max(channels) < len(iou) else math.nan


def _percent(value: float) -> str:
    return _DASH if math.isnan(value) else f"{round(value, 1) + 0.0:.1f}"
