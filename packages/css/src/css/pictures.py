"""Pictures of a continual run: IoU by step and class, confusion, what was segmented, what is in the memory."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from polymodal.files import write_bytes

from css.data.files import palette
from css.report import SCORES, StepReport
from css.samples import Shown, segment_some
from css.task import BACKGROUND, IGNORE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from css.data.datamodule import CSSDataModule
    from css.module import CSSModule
    from css.task import Task

__all__ = [
    "MemoryTile",
    "colourise",
    "confusion_plot",
    "iou_matrix",
    "iou_plot",
    "memory_sheet",
    "overlay",
    "prediction_grid",
    "predictions_grid",
    "save_picture",
]

_INK, _GREY, _LIGHT = "#1c1c28", "#6b7080", "#d9dce3"
_MAP = "YlGnBu"
_MAX_NUMBERS = 40
"""Columns up to which a number stands in every cell."""


@dataclass(frozen=True)
class MemoryTile:
    """One entry of the memory.

    Args:
        image: (h, w, 3) uint8, the crop or the whole picture.
        labels: (h, w) raw ids: each class gets an outline in its colour.
        name: of the class it was taken for.
        notes: lines below the name: provenance.
    """

    image: np.ndarray
    labels: np.ndarray
    name: str
    notes: tuple[str, ...] = ()


def save_picture(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a figure in the format that the name's ending says; the file appears whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=dpi, facecolor="white")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())


def _figure(width: float, height: float) -> Figure:
    """A figure that belongs to no window and leaves matplotlib's global state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)  # type: ignore[no-untyped-call]
    return figure


# ------------------------------------------------------------------ matrices


def iou_plot(reports: Sequence[StepReport], title: str = "") -> Figure:
    """IoU of every class (columns, in learning order) after every step (rows); classes not seen yet stay blank.

    Args:
        reports: of the steps in their order, at least one.
        title: heading.

    Returns:
        A figure; lines separate the steps' classes, the means stand at the right.
    """
    columns = len(reports[-1].iou)
    gap = 0.5
    values = np.full((len(reports), columns), math.nan)
    for row, report in enumerate(reports):
        values[row, : len(report.iou)] = report.iou
    means = np.array([[getattr(report, key) for key in SCORES] for report in reports])
    classes = reports[-1].classes
    labels = ["background", *(score.name for score in classes)]
    numbers = columns <= _MAX_NUMBERS
    cell = 0.56 if numbers else max(0.1, 18 / columns)
    font = 9 if numbers else max(3.5, min(9.0, cell * 40))
    left, right, top = 0.85, 0.2, 0.45 if title else 0.2
    bottom = 0.1 + max(_inches([*labels, "harmonic"], font) * (0.75 if numbers else 1.0), 0.8)
    wide = (columns + gap) * cell + len(SCORES) * 0.56
    high = len(reports) * (0.42 if len(reports) > 1 else 0.5)
    figure = _figure(left + wide + right, top + high + bottom)
    scale = 0.56 / cell
    axes = _axes(figure, left, bottom, wide, high)
    edges = columns + gap + scale * np.arange(len(SCORES) + 1)
    _cells(axes, values, np.arange(columns + 1.0), numbers)
    _cells(axes, means, edges, True)
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(len(reports), 0)
    for before, score in itertools.pairwise(classes):
        if score.step != before.step:
            first = next(row for row, report in enumerate(reports) if len(report.iou) > score.channel)
            axes.vlines(score.channel, first, len(reports), color=_INK, linewidth=1.2)
    places = [*(np.arange(columns) + 0.5), *((edges[:-1] + edges[1:]) / 2)]
    axes.set_xticks(places, [*labels, *SCORES], rotation=90 if not numbers else 45, size=font)
    for label in axes.get_xticklabels():
        label.set(ha="center" if not numbers else "right", rotation_mode=None if not numbers else "anchor")
    for label in axes.get_xticklabels()[columns:]:
        label.set(weight="bold", size=9)
    axes.set_yticks(np.arange(len(reports)) + 0.5, [f"step {report.step}" for report in reports], size=9)
    if title:
        figure.text(0.12 / figure.get_figwidth(), 1 - 0.28 / figure.get_figheight(), title, size=10, color=_INK)
    return figure


def confusion_plot(confusion: np.ndarray, labels: Sequence[str], title: str = "") -> Figure:
    """A confusion matrix as shares of the true class (rows) in percent.

    Args:
        confusion: (S, S) counts, rows truth.
        labels: of the S channels, background first.
        title: heading.

    Returns:
        A figure; a row without any pixel stays blank.
    """
    counts = np.asarray(confusion, dtype=float)
    total = counts.sum(1, keepdims=True)
    shares = np.where(total > 0, 100 * counts / np.maximum(total, 1), math.nan)
    size = len(counts)
    numbers = size <= _MAX_NUMBERS
    cell = 0.46 if numbers else max(0.08, 14 / size)
    font = 9 if numbers else max(3.5, min(9.0, cell * 40))
    margin = 0.35 + _inches(labels, font)
    top = 0.5 if title else 0.2
    figure = _figure(margin + size * cell + 0.25, margin + size * cell + top)
    axes = _axes(figure, margin, margin, size * cell, size * cell)
    _cells(axes, shares, np.arange(size + 1.0), numbers, digits=0)
    axes.set_xlim(0, size)
    axes.set_ylim(size, 0)
    places = np.arange(size) + 0.5
    axes.set_xticks(places, labels, rotation=90, size=font)
    axes.set_yticks(places, labels, size=font)
    axes.set_xlabel("predicted", color=_GREY, size=9)
    axes.set_ylabel("truth", color=_GREY, size=9)
    if title:
        figure.text(0.12 / figure.get_figwidth(), 1 - 0.3 / figure.get_figheight(), title, size=10, color=_INK)
    return figure


def _inches(texts: Sequence[str], size: float) -> float:
    """About the length of the longest text at a font size in points."""
    return max(map(len, texts)) * size * 0.62 / 72


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches, without frame."""
    total_width, total_height = figure.get_size_inches()
    place = (left / total_width, bottom / total_height, width / total_width, height / total_height)
    axes = figure.add_axes(place)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelcolor=_INK)
    return axes


def _cells(axes: Axes, values: np.ndarray, edges: np.ndarray, numbers: bool, digits: int = 1) -> None:
    """Coloured cells between ``edges`` (percent; NaN blank), each with its number where there is room."""
    from matplotlib import colormaps

    rows = np.arange(len(values) + 1.0)
    shades = colormaps[_MAP]
    line: dict[str, Any] = {"edgecolors": "white", "linewidth": 1.0} if numbers else {}
    axes.pcolormesh(edges, rows, np.ma.masked_invalid(values), cmap=shades, vmin=0, vmax=100, **line)
    if not numbers:
        return
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        red, green, blue, _ = shades(value / 100)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        axes.text(
            (edges[column] + edges[column + 1]) / 2,
            row + 0.5,
            f"{value:.{digits}f}",
            ha="center",
            va="center",
            size=8,
            color="white" if dark else _INK,
        )


# ------------------------------------------------------------------ segmentations


def colourise(labels: np.ndarray) -> np.ndarray:
    """(H, W) raw ids to (H, W, 3) uint8."""
    return palette()[labels]


def overlay(image: np.ndarray, labels: np.ndarray, strength: float = 0.6) -> np.ndarray:
    """A picture with its classes in their colours and a white line around each region; the background stays as it is.

    Args:
        image: (H, W, 3) uint8.
        labels: (H, W) raw ids.
        strength: share of the colour, 0..1.

    Returns:
        (H, W, 3) uint8.
    """
    mixed = image / 255.0
    inside = (labels != BACKGROUND) & (labels != IGNORE)
    mixed[inside] = (1 - strength) * mixed[inside] + strength * colourise(labels)[inside] / 255
    mixed[_borders(np.where(inside, labels, BACKGROUND))] = 1.0
    return np.round(mixed * 255).astype(np.uint8)


def _borders(labels: np.ndarray) -> np.ndarray:
    """Pixels of a class that have another label to their right or below them."""
    border = np.zeros(labels.shape, bool)
    border[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    border[:-1] |= labels[:-1] != labels[1:]
    return border


def prediction_grid(
    shown: Sequence[Shown],
    names: Sequence[str],
    title: str = "",
    rows: tuple[str, str, str] = ("image", "truth", "prediction"),
) -> Figure:
    """Pictures side by side: image, truth and prediction below each other, with a legend of what occurs.

    Args:
        shown: the pictures, at least one.
        names: class names by raw id.
        title: heading.
        rows: what stands beside the rows.
    """
    kinds: list[tuple[str, Any]] = [(rows[0], lambda item: item.image)]
    kinds += [
        (text, lambda item, kind=kind: None if getattr(item, kind) is None else colourise(getattr(item, kind)))
        for kind, text in zip(("truth", "prediction"), rows[1:], strict=True)
        if any(getattr(item, kind) is not None for item in shown)
    ]
    present = _present(shown)
    tile, gap, left = 1.7, 0.06, 0.32
    tall = tile * min(1.4, max(item.image.shape[0] / item.image.shape[1] for item in shown))
    top = (0.4 if title else 0.08) + (0.22 if any(item.title for item in shown) else 0.0)
    wide = len(shown) * (tile + gap)
    entries = _legend_rows(present, names, max(wide, 4.0))
    bottom = 0.15 + 0.22 * entries
    high = len(kinds) * (tall + gap)
    figure = _figure(left + max(wide, 4.0), top + high + bottom)
    for row, (kind, get) in enumerate(kinds):
        for column, item in enumerate(shown):
            place = (left + column * (tile + gap), bottom + high - (row + 1) * (tall + gap) + gap, tile, tall)
            axes = _axes(figure, *place)
            axes.set_xticks([])
            axes.set_yticks([])
            content = get(item)
            if content is not None:
                axes.imshow(content, interpolation="nearest", aspect="equal")
            if row == 0 and item.title:
                axes.set_title(_shorten(item.title, 22), size=7, color=_GREY, pad=3)
        y = (bottom + high - (row + 0.5) * (tall + gap)) / figure.get_figheight()
        figure.text(0.16 / figure.get_figwidth(), y, kind, rotation=90, ha="center", va="center", size=9, color=_GREY)
    if title:
        figure.text(left / figure.get_figwidth(), 1 - 0.27 / figure.get_figheight(), title, size=10, color=_INK)
    _legend(figure, present, names, entries, left)
    return figure


def _present(shown: Sequence[Shown]) -> list[int]:
    """Labels that occur in truth or prediction."""
    found: set[int] = set()
    for item in shown:
        for labels in (item.truth, item.prediction):
            if labels is not None:
                found.update(np.unique(labels).tolist())
    return sorted(found)


def _label_text(raw: int, names: Sequence[str]) -> str:
    return {BACKGROUND: "background", IGNORE: "ignored"}.get(raw) or names[raw - 1]


def _columns(present: Sequence[int], names: Sequence[str], width: float) -> int:
    longest = max((len(_label_text(raw, names)) for raw in present), default=1)
    return max(1, int(width / (0.42 + 0.078 * longest)))


def _legend_rows(present: Sequence[int], names: Sequence[str], width: float) -> int:
    return math.ceil(len(present) / _columns(present, names, width))


def _legend(figure: Figure, present: Sequence[int], names: Sequence[str], rows: int, left: float) -> None:
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    columns = _columns(present, names, width - left)
    step = (width - left) / columns
    for number, raw in enumerate(present):
        row, column = divmod(number, columns)
        x, y = left + column * step, 0.08 + 0.22 * (rows - 1 - row)
        colour = colourise(np.array([[raw]]))[0, 0]
        box = Rectangle((x / width, y / height), 0.16 / width, 0.14 / height, facecolor=tuple(colour / 255))
        box.set(transform=figure.transFigure, edgecolor=_LIGHT, linewidth=0.6)
        figure.add_artist(box)
        figure.text((x + 0.22) / width, (y + 0.015) / height, _label_text(raw, names), size=8, color=_INK)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


# ------------------------------------------------------------------ of a run


def iou_matrix(path: Path, reports: Sequence[StepReport], title: str = "") -> None:
    """Write ``iou_plot`` as a file; see there."""
    save_picture(iou_plot(reports, title), path)


def predictions_grid(
    path: Path, module: CSSModule, data: CSSDataModule, names: Sequence[str], task: Task, count: int = 6
) -> None:
    """Segment some test pictures of a step and write them as a picture grid.

    Args:
        path: the file.
        module: network and prediction rule of the step.
        data: loaders of the step.
        names: class names by raw id.
        task: whose channels the network has.
        count: number of pictures.
    """
    classes = ", ".join(names[raw - 1] for raw in task.steps[data.step][:8])
    shown = segment_some(module.net, module.method, data, "test", task, count)
    save_picture(prediction_grid(shown, names, f"test pictures after step {data.step} (which brought {classes})"), path)


# ------------------------------------------------------------------ memory


def memory_sheet(tiles: Sequence[MemoryTile], title: str, columns: int = 8) -> Figure:
    """The entries of a memory: crops with the object's outline in the colour of its class, name and provenance.

    Args:
        tiles: entries, at least one, in the order to be shown.
        title: heading: number of entries, bytes.
        columns: tiles in a row.
    """
    colours = palette() / 255
    columns = max(3, min(columns, len(tiles)))
    lines = 1 + max(len(tile.notes) for tile in tiles)
    side, gap, text, top = 1.25, 0.12, 0.06 + 0.14 * lines, 0.45
    rows = math.ceil(len(tiles) / columns)
    figure = _figure(0.15 + columns * (side + gap), top + rows * (side + text + gap) + 0.05)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        x = 0.15 + column * (side + gap)
        y = figure.get_figheight() - top - (row + 1) * (side + text + gap) + text + gap
        axes = _axes(figure, x, y, side, side)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.imshow(tile.image, interpolation="nearest", aspect="equal")
        for raw in np.unique(tile.labels).tolist():
            if raw not in (BACKGROUND, IGNORE):
                _draw_outline(axes, tile.labels == raw, colours[raw])
        for line, content in enumerate((tile.name, *tile.notes)):
            figure.text(
                x / figure.get_figwidth(),
                (y - 0.14 * (line + 1)) / figure.get_figheight(),
                _shorten(content, 24),
                size=7 if line else 8,
                color=_GREY if line else _INK,
                weight="normal" if line else "bold",
            )
    figure.text(0.15 / figure.get_figwidth(), 1 - 0.27 / figure.get_figheight(), title, size=10, color=_INK)
    return figure


def _draw_outline(axes: Axes, mask: np.ndarray, colour: np.ndarray) -> None:
    """The mask's rim as a line on a white one, so that it shows on any picture."""
    padded = np.pad(mask.astype(float), 1)
    places = (np.arange(padded.shape[1]) - 1, np.arange(padded.shape[0]) - 1)
    for line, width in (("white", 2.4), (tuple(colour), 1.2)):
        axes.contour(*places, padded, levels=[0.5], colors=[line], linewidths=width)
    axes.set_xlim(-0.5, mask.shape[1] - 0.5)
    axes.set_ylim(mask.shape[0] - 0.5, -0.5)
