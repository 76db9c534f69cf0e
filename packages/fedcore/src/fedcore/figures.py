"""Pictures of federated runs as PNG: accuracy over rounds, accuracy by client, labels by client, a loss surface."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from polymodal.curves import PALETTE, average, color
from polymodal.errors import UserError
from polymodal.run_reader import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedcore.landscape import Surface

__all__ = ["client_accuracy", "curves", "label_counts", "surface"]

Line = Sequence[tuple[int, float]]
"""(round, value) pairs of one run."""


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def curves(
    runs: Mapping[str, Sequence[Line]],
    *,
    y_label: str = "test accuracy",
    title: str = "",
    x_label: str = "round",
    target: float | None = None,
) -> bytes:
    """Mean over seeds with a band of one standard deviation, a line for each group.

    Args:
        runs: group -> the curve of each of its seeds, (round, value) pairs with rising rounds.
        y_label: name of the value.
        title: of the picture.
        x_label: name of the x-axis.
        target: a value to mark by a dashed line, such as the accuracy whose rounds are counted.

    Returns:
        PNG file content.

    Raises:
        UserError: no group has a value.
    """
    points = {group: [[Point(x, None, y) for x, y in line] for line in lines] for group, lines in runs.items()}
    averaged = average(points)
    if not averaged:
        raise UserError("no curve to draw: no run has a value")
    figure, axes = _figure(6.4, 4.0)
    for index, curve in enumerate(averaged):
        style = ("-", "--", ":", "-.")[index // len(PALETTE) % 4]
        label = f"{curve.group} (n={curve.runs})"
        marker = "o" if len(curve.steps) < 3 else None
        axes.plot(curve.steps, curve.mean, style, color=color(index), marker=marker, linewidth=1.6, label=label)
        if curve.runs > 1:
            low, high = curve.mean - curve.sd, curve.mean + curve.sd
            axes.fill_between(curve.steps, low, high, color=color(index), alpha=0.15, linewidth=0)
    if target is not None:
        axes.axhline(target, color="#888888", linestyle="--", linewidth=1.0)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def client_accuracy(accuracies: Mapping[str, Sequence[float]], *, title: str = "accuracy by client") -> bytes:
    """Distribution of accuracy over clients: the share of clients at or below each accuracy, a step line a group.

    Unlike a histogram it needs no bins, so that a few clients and many groups stay readable; the vertical tick on each
    line is the group's mean.

    Args:
        accuracies: group -> accuracy of each client, 0..1.
        title: of the picture.

    Returns:
        PNG file content.

    Raises:
        UserError: a group without clients.
    """
    figure, axes = _figure(6.4, 4.0)
    for index, (group, values) in enumerate(accuracies.items()):
        if not len(values):
            raise UserError(f"{group}: no client's accuracy to draw")
        ordered = np.sort(np.asarray(values, dtype=np.float64))
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        mean, worst = float(ordered.mean()), float(ordered[0])
        label = f"{group}: mean {mean:.3f}, worst {worst:.3f}"
        axes.step([ordered[0], *ordered], [0.0, *share], where="post", color=color(index), label=label)
        axes.plot([mean], [float(np.mean(ordered <= mean))], "|", color=color(index), markersize=14)
    axes.set(xlabel="accuracy", ylabel="share of clients at or below", ylim=(0, 1.02))
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def label_counts(
    counts: npt.ArrayLike, *, class_names: Sequence[str] | None = None, title: str = "samples by client and label"
) -> bytes:
    """Label x client: how many samples of each class every client has, as a heat map.

    Args:
        counts: (clients, classes) numbers of samples.
        class_names: names of the classes; their numbers by default.
        title: of the picture.

    Returns:
        PNG file content.

    Raises:
        UserError: not a table of counts, or another number of names than classes.
    """
    table = np.asarray(counts)
    if table.ndim != 2 or not table.size or table.min() < 0:
        raise UserError(f"label counts of shape {table.shape}; expected (clients, classes), 0 or more")
    clients, classes = table.shape
    names = [str(i) for i in range(classes)] if class_names is None else list(class_names)
    if len(names) != classes:
        raise UserError(f"{len(names)} class names for {classes} classes")
    width, height = min(14.0, 2.5 + 0.11 * clients), min(10.0, 1.8 + 0.2 * classes)
    figure, axes = _figure(max(width, 5.0), max(height, 2.6))
    # A square root keeps small counts visible beside large ones; empty cells stay white.
    shown = np.ma.masked_equal(np.sqrt(table.T.astype(np.float64)), 0.0)
    image = axes.imshow(shown, aspect="auto", cmap="viridis_r", vmin=0.0, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    ticks = np.unique(np.round(np.linspace(0.0, np.sqrt(table.max()), 5) ** 2))
    bar.set_ticks(np.sqrt(ticks).tolist(), labels=[f"{int(t)}" for t in ticks])
    bar.set_label("samples")
    step = -(-classes // 40)
    axes.set_yticks(range(0, classes, step), labels=names[::step], fontsize=8)
    axes.set(xlabel="client", ylabel="label")
    axes.set_title(title, loc="left", fontsize=11)
    return _png(figure)


def surface(found: Surface, *, title: str = "loss") -> bytes:
    """Contours of a loss surface; the cross is the model itself.

    Args:
        found: from ``fedcore.landscape.loss_surface``.
        title: of the picture.

    Returns:
        PNG file content.

    Raises:
        UserError: nowhere finite, or the same everywhere.
    """
    table = np.asarray(found.loss, dtype=np.float64)
    finite = table[np.isfinite(table)]
    if not finite.size or finite.min() == finite.max():
        raise UserError("the loss surface is flat or nowhere finite; choose another radius")
    figure, axes = _figure(5.4, 4.4)
    # Logarithmic levels above the lowest loss: the basin and its walls differ by orders of magnitude.
    low, high = float(finite.min()), float(finite.max())
    levels = low + (high - low) * np.geomspace(0.002, 1.0, 18)
    filled = axes.contourf(found.beta, found.alpha, np.ma.masked_invalid(table), levels=[low, *levels], cmap="viridis")
    axes.contour(found.beta, found.alpha, table, levels=levels, colors="white", linewidths=0.4)
    axes.plot([0.0], [0.0], "x", color="#d1660f", markersize=9, markeredgewidth=2)
    figure.colorbar(filled, ax=axes, label="loss", format="%.3g")
    axes.set(xlabel="second direction", ylabel="first direction", aspect="equal")
    axes.set_title(title, loc="left", fontsize=11)
    return _png(figure)
