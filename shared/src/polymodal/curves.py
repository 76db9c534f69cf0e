"""Curves over seeds: one mean line with a band of a standard deviation a group, as PNG or for inline SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polymodal.run_reader import Point

__all__ = ["PALETTE", "Curve", "average", "color", "to_png"]

PALETTE = ("#2563a8", "#d1660f", "#1d8a63", "#b4417f", "#6a4fb3", "#a07a00", "#3a9cc4", "#5a6270")
"""Line colours by group; told apart under the common colour-vision deficiencies, and repeated beyond eight."""


def color(index: int) -> str:
    """Colour of the group with this index."""
    return PALETTE[index % len(PALETTE)]


@dataclass(frozen=True)
class Curve:
    """Mean over the runs of one group.

    Args:
        group: name of the group.
        steps: (points,) x values, rising.
        mean: (points,) mean over the runs that cover the step.
        sd: (points,) sample standard deviation; 0 where fewer than two runs cover the step.
        runs: number of runs.
    """

    group: str
    steps: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    sd: npt.NDArray[np.float64]
    runs: int


def average(runs: Mapping[str, Sequence[Sequence[Point]]], max_points: int = 300) -> list[Curve]:
    """Average the curves of one metric by group.

    The steps are those at which any run of the group has a value; the other runs are interpolated linearly between
    their own neighbours, never beyond their ends. Longer curves are thinned to evenly spaced steps, ends kept.

    Args:
        runs: group -> the curve of each of its runs.
        max_points: most points a curve keeps, at least 2.

    Returns:
        One curve a group that has a value, in the order given.
    """
    curves = []
    for group, members in runs.items():
        lines = [([p.step for p in line], [p.value for p in line]) for line in members if line]
        if not lines:
            continue
        steps = np.unique(np.concatenate([np.asarray(x, dtype=np.float64) for x, _ in lines]))
        if len(steps) > max_points:
            steps = steps[np.unique(np.linspace(0, len(steps) - 1, max_points).round().astype(np.int64))]
        table = np.stack([np.interp(steps, x, y, left=np.nan, right=np.nan) for x, y in lines])
        count = np.isfinite(table).sum(axis=0)
        mean = np.nansum(table, axis=0) / count
        squares = np.nansum((table - mean) ** 2, axis=0)
        sd = np.sqrt(squares / np.maximum(count - 1, 1))
        curves.append(Curve(group, steps, mean, sd, len(lines)))
    return curves


def to_png(title: str, curves: Sequence[Curve], x_label: str = "step", dpi: int = 150) -> bytes:
    """Draw mean lines with bands.

    Args:
        title: of the picture; the metric's name.
        curves: what to draw.
        x_label: name of the x-axis.
        dpi: resolution.

    Returns:
        A PNG file's content.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.8), dpi=dpi, layout="constrained")
    axes = figure.add_subplot()
    for index, curve in enumerate(curves):
        style = "-" if index < len(PALETTE) else "--"
        marker = "o" if len(curve.steps) < 3 else None
        label = f"{curve.group} (n={curve.runs})"
        axes.plot(curve.steps, curve.mean, style, color=color(index), marker=marker, linewidth=1.8, label=label)
        if curve.runs > 1:
            low, high = curve.mean - curve.sd, curve.mean + curve.sd
            axes.fill_between(curve.steps, low, high, color=color(index), alpha=0.18, lw=0)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
