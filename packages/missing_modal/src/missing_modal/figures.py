"""Pictures as PNG: reliability of probabilities, the matrix as a heat map, scores over the missing rate."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from polymodal.curves import PALETTE, color
from polymodal.errors import UserError
from polymodal.files import write_bytes

from missing_modal.metrics import score_samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from missing_modal.calibration import Temperatures
    from missing_modal.data.base import Task
    from missing_modal.records import Packed

__all__ = ["heat_map", "rate_curves", "reliability", "save"]

_BINS = 15
_STYLES = ("-", "--", ":", "-.")
Band = Sequence[tuple[float, float, float]]
"""(x, mean, deviation) points of a line, x rising"""


def _png(figure: Figure) -> bytes:
    """The picture with a palette of 256 colours: a third of the bytes, and nothing that is seen is lost."""
    from PIL import Image

    full, content = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png")
    Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(content, format="png", optimize=True)
    return content.getvalue()


def _axes(columns: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, columns, sharey=True)))
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(path: Path, picture: bytes) -> None:
    """Write a picture; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, picture)


def reliability(packed: Packed, temperatures: Temperatures | None, task: Task, *, title: str = "") -> bytes:
    """How often the found class is right, by the probability that it was given: on the diagonal where it is honest.

    Args:
        packed: logits, labels and patterns of the samples.
        temperatures: by pattern; None: one line, of the probabilities as trained.
        task: multiclass, multilabel, binary; with several labels each output is a decision of its own.
        title: of the picture.

    Returns:
        PNG file content.
    """
    lines = {"as trained": packed.logits}
    if temperatures is not None:
        lines["calibrated"] = temperatures.scale(packed.logits, packed.masks)
    figure, (axes,) = _axes(1, 4.6, 4.2)
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=1.0, linestyle=":")
    for number, (name, logits) in enumerate(lines.items()):
        scores = score_samples(logits, packed.labels, task)
        bins, hits = scores.bins.ravel(), (scores.truth == scores.predicted).ravel().astype(np.float64)
        counts = np.bincount(bins, minlength=_BINS)
        held = counts > 0
        confidence = np.bincount(bins, weights=scores.confidence.ravel(), minlength=_BINS)[held] / counts[held]
        right = np.bincount(bins, weights=hits, minlength=_BINS)[held] / counts[held]
        gap = float(np.abs(right - confidence) @ counts[held] / counts.sum())
        axes.plot(confidence, right, "-o", color=color(number), markersize=4, label=f"{name}: ECE {100 * gap:.1f} %")
    axes.set(xlabel="probability of the found class", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def heat_map(
    means: Mapping[tuple[str, str], float],
    deviations: Mapping[tuple[str, str], float | None],
    *,
    x_label: str = "missing in the test",
    y_label: str = "missing in training",
    title: str = "",
) -> bytes:
    """Training pattern x test pattern, the mean over seeds by colour and as a number with its deviation.

    Args:
        means: (row, column) -> value, such as percent; the order of first occurrence is that of the picture.
        deviations: the same keys -> sample deviation over seeds, or None for a single seed.
        x_label: of the columns.
        y_label: of the rows.
        title: of the picture.

    Returns:
        PNG file content.

    Raises:
        UserError: no cell.
    """
    if not means:
        raise UserError("no cell to draw: no model was evaluated")
    rows, columns = list(dict.fromkeys(row for row, _ in means)), list(dict.fromkeys(column for _, column in means))
    table = np.array([[means.get((row, column), np.nan) for column in columns] for row in rows])
    longest = max(map(len, rows))
    figure, (axes,) = _axes(1, 2.2 + 0.08 * longest + 1.05 * len(columns), 1.6 + 0.5 * len(rows))
    image = axes.imshow(np.ma.masked_invalid(table), aspect="auto", cmap="viridis", interpolation="nearest")
    low, high = float(np.nanmin(table)), float(np.nanmax(table))
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if np.isnan(table[y, x]):
                continue
            sd = deviations.get((row, column))
            text = f"{table[y, x]:.1f}" + ("" if sd is None else f"\n± {sd:.1f}")
            dark = high > low and (table[y, x] - low) / (high - low) < 0.55
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), labels=columns, fontsize=8)
    axes.set_yticks(range(len(rows)), labels=rows, fontsize=8)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(title, loc="left", fontsize=10)
    figure.colorbar(image, ax=axes, pad=0.02)
    return _png(figure)


def rate_curves(
    panels: Mapping[tuple[str, str], Mapping[str, Band]],
    *,
    y_label: str,
    x_label: str = "rows that lack something (%)",
    title: str = "",
) -> bytes:
    """Scores over the missing rate of the test: a grid of panels, a line a model, a band of one deviation.

    Args:
        panels: (what was missing in training, what is missing in the test) -> model -> (rate, mean, deviation over
            seeds) points with rising rates; a deviation of 0 draws no band. Rows of the grid are the first names, ""
            where the lines tell the training apart; columns are the second ones.
        y_label: name of the score.
        x_label: name of the rate.
        title: of the picture.

    Returns:
        PNG file content.

    Raises:
        UserError: no line.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    if not names:
        raise UserError("no curve to draw: no model was evaluated")
    rows, columns = list(dict.fromkeys(row for row, _ in panels)), list(dict.fromkeys(column for _, column in panels))
    width, height = (3.4, 3.2) if len(columns) <= 4 else (2.3, 2.2)
    legend = -(-len(names) // 6) * 0.25
    size = (1.2 + width * len(columns), 1.0 + legend + height * len(rows))
    figure = Figure(figsize=size, dpi=110 if len(columns) <= 4 else 80, layout="constrained")
    axes = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    for (row, column), lines in panels.items():
        one = axes[rows.index(row)][columns.index(column)]
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
        for name, points in lines.items():
            _line(one, names.index(name), name, points)
        one.set_title(f"missing in the test: {column}" if row == rows[0] else "", loc="left", fontsize=9)
        one.set(xlabel=x_label if row == rows[-1] else "")
        if column == columns[0]:
            one.set(ylabel=f"missing in training: {row}\n{y_label}" if row else y_label)
            one.yaxis.label.set_fontsize(8)
    shown = {label: line for one in axes.flat for line, label in zip(*one.get_legend_handles_labels(), strict=True)}
    figure.legend(
        [shown[name] for name in names], names, loc="outside lower center", ncols=6, frameon=False, fontsize=8
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return _png(figure)


def _line(axes: Any, number: int, name: str, points: Band) -> None:
    x, mean, sd = (np.array(values, dtype=np.float64) for values in zip(*points, strict=True))
    style = _STYLES[number // len(PALETTE) % len(_STYLES)]
    axes.plot(x, mean, style, marker="o", markersize=3, color=color(number), linewidth=1.6, label=name)
    if sd.any():
        axes.fill_between(x, mean - sd, mean + sd, color=color(number), alpha=0.12, linewidth=0)
