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
    "ClassScore",
    "StepReport",
    "class_table",
    "closing_table",
    "final_metrics",
    "forgetting_by_class",
    "read_confusion",
    "read_reports",
    "write_confusion",
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
    def from_confusion(
        cls, confusion: np.ndarray, task: Task, names: Sequence[str], step: int, images: int = 0
    ) -> StepReport:
        """Scores of a confusion matrix.

        Args:
            confusion: (S, S) counts, rows truth, S = background and every class seen up to ``step``.
            task: which classes belong to which step.
            names: class names by raw id: ``names[raw - 1]``.
            step: the step after which the pictures were segmented.
            images: number of pictures.

        Raises:
            ValueError: a matrix of another size.
        """
        matrix = np.asarray(confusion)
        channels = task.num_channels(step)
        if matrix.shape != (channels, channels):
            raise ValueError(f"confusion matrix {matrix.shape} after step {step} of {task.name}; expected {channels}²")
        base = task.num_channels(0) - 1
        scores = metrics.segmentation_report(matrix, base, channels - 1 - base)
        iou = [float(value) for value in metrics.class_iou(matrix)]
        classes = tuple(
            ClassScore(names[task.raw(channel) - 1], task.raw(channel), channel, origin, iou[channel])
            for origin in range(step + 1)
            for channel in task.channels(origin)
        )
        later = {key: float(scores[key]) if step else math.nan for key in ("new", "harmonic")}
        return cls(
            step,
            task.name,
            classes,
            iou[0],
            float(scores["old"]),
            later["new"],
            float(scores["all"]),
            later["harmonic"],
            images,
            matrix,
        )

    @property
    def iou(self) -> np.ndarray:
        """(S,) percent by channel, background first."""
        return np.array([self.background_iou, *(score.iou for score in self.classes)])

    def metrics(self, prefix: str = "test") -> dict[str, float]:
        """``<prefix>/miou_old`` and so on, without those that the step does not have."""
        values = {f"{prefix}/miou_{key}": getattr(self, key) for key in SCORES}
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
        return cls(
            step, task, classes, background, old, new, every, harmonic, int(stored.get("images", 0)), confusion
        )

    def write(self, folder: Path) -> None:
        """Write ``report.json`` and, where there is a matrix, ``confusion.json`` into a step folder."""
        if self.confusion is not None:
            write_confusion(folder / CONFUSION_FILE, self.confusion)
        write_json(folder / REPORT_FILE, self.to_json())

    @classmethod
    def read(cls, folder: Path) -> StepReport:
        """The report of a step folder, with its matrix where that is there.

        Raises:
            UserError: no report there, or a damaged one.
        """
        path, matrix = folder / REPORT_FILE, folder / CONFUSION_FILE
        try:
            return cls.from_json(_read_json(path), read_confusion(matrix) if matrix.is_file() else None)
        except UserError as error:
            raise error if str(path) in str(error) or str(matrix) in str(error) else UserError(f"{path}: {error}")


def read_reports(steps: Path) -> list[StepReport]:
    """Reports of all finished steps below ``run.folder/steps``, in their order."""
    return [StepReport.read(path.parent) for path in sorted(steps.glob(f"*/{REPORT_FILE}"))]


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


def forgetting_by_class(reports: Sequence[StepReport]) -> dict[int, float]:
    """Best earlier IoU minus final IoU of each class seen before the last step, by channel, in points of percent.

    Source: eir.md 4.3. Negative where a class got better than it ever was.
    """
    if len(reports) < 2:
        return {}
    fallen = np.asarray(metrics.forgetting([report.iou for report in reports]), dtype=float)
    earlier = len(reports[-2].classes)
    return {channel: float(fallen[channel]) for channel in range(1, earlier + 1)}


def final_metrics(reports: Sequence[StepReport], prefix: str = "test") -> dict[str, float]:
    """Metrics of a whole run: those of the last step, mean forgetting and the average of ``all`` over steps."""
    found = reports[-1].metrics(prefix)
    fallen = forgetting_by_class(reports)
    if fallen:
        found[f"{prefix}/forgetting"] = sum(fallen.values()) / len(fallen)
    found[f"{prefix}/miou_avg"] = sum(report.all for report in reports) / len(reports)
    return found


def closing_table(reports: Sequence[StepReport], task: Task, names: Sequence[str]) -> str:
    """IoU of every class after each step, then old, new, all, harmonic; forgetting in the last column.

    Args:
        reports: of the steps in their order; at least one.
        task: the task.
        names: class names by raw id.

    Returns:
        An aligned Markdown table with a line of explanation. Beyond 40 classes a row is the mean of a step's classes.
    """
    last, fallen = reports[-1], forgetting_by_class(reports)
    header = ["class", "learnt in", *(f"after {report.step}" for report in reports)]
    rows = [["background", _DASH, *(_percent(report.background_iou) for report in reports)]]
    groups = _rows_of(last, task, names)
    for name, origin, channels in groups:
        rows.append([name, str(origin), *(_percent(_mean(report.iou, channels)) for report in reports)])
    scores = [[key, _DASH, *(_percent(getattr(report, key)) for report in reports)] for key in SCORES]
    notes = ["IoU in percent; old: background and base classes; all: background and all classes seen."]
    if fallen:
        header.append("forgetting")
        column = [[fallen[c] for c in channels if c in fallen] for _, _, channels in groups]
        cells = [_DASH, *(_percent(sum(v) / len(v)) if v else _DASH for v in column)]
        rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
        mean = sum(fallen.values()) / len(fallen)
        scores = [[*row, _percent(mean) if row[0] == "all" else _DASH] for row in scores]
        average = sum(report.all for report in reports) / len(reports)
        notes.append(
            f"forgetting: best earlier IoU - final IoU (mean over {len(fallen)} classes: {mean:.1f}); "
            f"average of all over steps: {average:.1f}"
        )
    return markdown(header, rows + scores) + "\n\n" + "\n".join(notes)


def class_table(report: StepReport) -> str:
    """IoU of every class after one step, and the means: an aligned Markdown table."""
    rows = [["background", "0", _DASH, _percent(report.background_iou)]]
    rows += [[score.name, str(score.raw), str(score.step), _percent(score.iou)] for score in report.classes]
    rows += [[key, _DASH, _DASH, _percent(getattr(report, key))] for key in SCORES]
    return markdown(["class", "id", "learnt in", "IoU (%)"], rows)


def _rows_of(report: StepReport, task: Task, names: Sequence[str]) -> list[tuple[str, int, Sequence[int]]]:
    """(text, step, channels) of each row between background and the means."""
    steps = [origin for origin in range(report.step + 1) if len(task.channels(origin))]
    if len(report.classes) > MAX_ROWS:
        return [(f"step {s}: {len(task.channels(s))} classes", s, task.channels(s)) for s in steps]
    return [(names[task.raw(c) - 1], s, (c,)) for s in steps for c in task.channels(s)]


def _mean(iou: np.ndarray, channels: Sequence[int]) -> float:
    """Mean IoU of channels; NaN where the step did not know them yet."""
    return float(np.mean(iou[list(channels)])) if max(channels) < len(iou) else math.nan


def _percent(value: float) -> str:
    return _DASH if math.isnan(value) else f"{value:.1f}"
