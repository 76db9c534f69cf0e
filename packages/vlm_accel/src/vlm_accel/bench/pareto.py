"""Quality against cost as a figure: which rows are on the front."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polymodal.files import write_bytes

from vlm_accel.bench.report import main_metric
from vlm_accel.methods import METHODS

__all__ = ["draw_pareto", "front"]

Record = Mapping[str, Any]
_COLOURS = {"full": "black", "vision": "tab:blue", "features": "tab:green", "llm": "tab:red", "cache": "tab:purple"}


def front(points: Sequence[tuple[float, float]], higher: bool = True) -> list[int]:
    """Numbers of the points (cost, quality) that no other one beats in both, by ascending cost.

    Args:
        points: cost (lower is better) and quality.
        higher: whether more quality is better; False for KL.
    """
    sign = 1 if higher else -1
    best, kept = float("-inf"), []
    for number in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if sign * points[number][1] > best:
            best = sign * points[number][1]
            kept.append(number)
    return kept


def draw_pareto(path: Path, records: Sequence[Record], title: str) -> None:
    """PNG: quality and KL over the share of MACs (rows that shorten tokens) and of cache bytes (all rows).

    Controls (random, stride, pooling, …) are rings; rows on the front are named.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    main = main_metric(records)
    good = [row for row in records if not row["error"]]
    prefill = [row for row in good if row["group"] != "cache"]
    panels = [
        (prefill, "macs/total", main, "MACs of vision and prefill, % of the unmodified model"),
        (prefill, "macs/total", "fidelity/kl", "MACs of vision and prefill, % of the unmodified model"),
        (good, "kv/bytes", main, "cache bytes, % of the unmodified model"),
        (good, "kv/bytes", "fidelity/kl", "cache bytes, % of the unmodified model"),
    ]
    figure = Figure(figsize=(15, 11), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (rows, cost, quality, label) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        _panel(axes, rows, records[0]["metrics"], cost, quality)
        axes.set_xlabel(label)
    handles = [axes_handle(figure.axes[0], group, colour) for group, colour in _COLOURS.items()]
    figure.axes[0].legend(handles=handles, loc="lower right", fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, content.getvalue())


def axes_handle(axes: Any, group: str, colour: str) -> Any:
    """Legend entry of a group."""
    return axes.plot([], [], "o", color=colour, label=group)[0]


def _is_control(row: Record) -> bool:
    """Whether all methods of a row are controls."""
    names = [part.partition("@")[0] for part in row["method"].split("+")]
    return all(name in METHODS.names() and "control" in METHODS.info(name).tags for name in names)


def _panel(axes: Any, rows: Sequence[Record], full: Mapping[str, float], cost: str, quality: str) -> None:
    is_kl = quality == "fidelity/kl"
    rows = [row for row in rows if cost in row["metrics"] and quality in row["metrics"] and full.get(cost)]
    points = [(100 * row["metrics"][cost] / full[cost], row["metrics"][quality]) for row in rows]
    if is_kl:  # the unmodified model has none: it would be off a logarithmic axis
        rows, points = rows[1:], [(x, max(y, 1e-6)) for x, y in points[1:]]
        axes.set_yscale("log")
    for row, (x, y) in zip(rows, points, strict=True):
        colour = _COLOURS.get(row["group"].split("+")[0], "tab:gray")
        axes.plot(x, y, "o", color=colour, markersize=5, markerfacecolor="none" if _is_control(row) else colour)
    best = front(points, higher=not is_kl)
    axes.plot([points[i][0] for i in best], [points[i][1] for i in best], "-", color="0.6", linewidth=1, zorder=0)
    for number in best:
        axes.annotate(rows[number]["label"], points[number], fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set_ylabel("KL to the unmodified model, nats" if is_kl else quality.removeprefix("test/"))
    axes.grid(alpha=0.3)
