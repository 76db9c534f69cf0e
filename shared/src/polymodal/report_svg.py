"""Small inline SVG pictures of the HTML report: curves, seeds as dots, differences with their intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape

from polymodal.curves import Curve
from polymodal.stats import PairedDifference

__all__ = ["differences", "dots", "lines", "number", "ticks"]

_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 30
_ROW = 26


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high``: about ``count`` of them, steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Short form of a number for an axis or a tooltip."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.1e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:.4g}"


class _Scale:
    """Linear map of data to pixels; a flat range is widened."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if high <= low:
            pad = abs(low) * 0.05 or 0.5
            low, high = low - pad, high + pad
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def lines(curves: Sequence[Curve], x_label: str, colors: Mapping[str, str]) -> str:
    """Mean lines with bands of one standard deviation.

    Args:
        curves: one a group.
        x_label: name of the x-axis.
        colors: colour by group.

    Returns:
        An ``svg`` element; its ``data-curves`` attribute holds the numbers for the tooltip.
    """
    x_low = min(float(c.steps[0]) for c in curves)
    x_high = max(float(c.steps[-1]) for c in curves)
    y_low = min(float((c.mean - c.sd).min()) for c in curves)
    y_high = max(float((c.mean + c.sd).max()) for c in curves)
    pad = 0.04 * (y_high - y_low)
    x = _Scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT)
    y = _Scale(y_low - pad, y_high + pad, _HEIGHT - _BOTTOM, _TOP)
    parts = _axes(x, y, x_label)
    for curve in curves:
        stroke = colors[curve.group]
        if curve.runs > 1:
            upper = [f"{x(float(s))},{y(float(m + d))}" for s, m, d in _triples(curve)]
            lower = [f"{x(float(s))},{y(float(m - d))}" for s, m, d in _triples(curve)]
            parts.append(f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{stroke}" class="band"/>')
        points = " ".join(f"{x(float(s))},{y(float(m))}" for s, m, _ in _triples(curve))
        parts.append(f'<polyline points="{points}" stroke="{stroke}" class="line"/>')
    data = {
        "x0": x.low,
        "x1": x.high,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "label": x_label,
        "curves": [
            {
                "g": c.group,
                "c": colors[c.group],
                "x": [float(v) for v in c.steps],
                "y": [float(f"{v:.4g}") for v in c.mean],
                "s": [float(f"{v:.2g}") for v in c.sd] if c.runs > 1 else [],
            }
            for c in curves
        ],
    }
    parts.append(f'<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" x1="-9" x2="-9"/>')
    attribute = escape(json.dumps(data, separators=(",", ":")), quote=True)
    return _svg(_HEIGHT, parts, f' class="curves" data-curves="{attribute}"')


def _triples(curve: Curve) -> list[tuple[float, float, float]]:
    return list(zip(curve.steps.tolist(), curve.mean.tolist(), curve.sd.tolist(), strict=True))


def _axes(x: _Scale, y: _Scale, x_label: str) -> list[str]:
    parts = []
    for value in ticks(y.low, y.high):
        at = y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 3.5}" text-anchor="end">{number(value)}</text>')
    base = _HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    for value in ticks(x.low, x.high, 6):
        parts.append(f'<text x="{x(value)}" y="{base + 14}" text-anchor="middle">{number(value)}</text>')
    parts.append(
        f'<text class="label" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>'
    )
    return parts


def dots(values: Mapping[str, Mapping[int, float]], colors: Mapping[str, str]) -> str:
    """One row a group: a dot a seed and a bar at the mean.

    Args:
        values: group -> seed -> value; groups without a value are left out.
        colors: colour by group.
    """
    rows = {g: v for g, v in values.items() if v}
    flat = [value for v in rows.values() for value in v.values()]
    x, left = _row_scale(rows, min(flat), max(flat))
    parts = _row_axis(x, len(rows))
    for index, (group, by_seed) in enumerate(rows.items()):
        at = _TOP + index * _ROW + _ROW / 2
        parts.append(_row_label(group, left, at))
        mean = x(math.fsum(by_seed.values()) / len(by_seed))
        parts.append(
            f'<line x1="{mean}" x2="{mean}" y1="{at - 8}" y2="{at + 8}" stroke="{colors[group]}" stroke-width="3"/>'
        )
        for seed, value in by_seed.items():
            parts.append(
                f'<circle cx="{x(value)}" cy="{at}" r="4.5" fill="{colors[group]}" class="dot">'
                f"<title>{escape(group)}, seed {seed}: {number(value)}</title></circle>"
            )
    return _svg(_TOP + len(rows) * _ROW + _BOTTOM - 8, parts)


def differences(found: Mapping[str, PairedDifference], colors: Mapping[str, str]) -> str:
    """One row a group: mean difference as a dot, its interval as a line, zero as a rule.

    Args:
        found: group -> difference to the baseline.
        colors: colour by group.
    """
    ends = [e for d in found.values() for e in (d.low, d.high, d.mean, 0.0) if e is not None]
    x, left = _row_scale(found, min(ends), max(ends))
    parts = _row_axis(x, len(found))
    bottom = _TOP + len(found) * _ROW
    parts.append(f'<line class="zero" x1="{x(0.0)}" x2="{x(0.0)}" y1="{_TOP}" y2="{bottom}"/>')
    for index, (group, d) in enumerate(found.items()):
        at = _TOP + index * _ROW + _ROW / 2
        parts.append(_row_label(group, left, at))
        text = f"{escape(group)}: {d.mean:+.4g}"
        if d.low is not None and d.high is not None:
            stroke = f'stroke="{colors[group]}" stroke-width="2.5"'
            parts.append(f'<line x1="{x(d.low)}" x2="{x(d.high)}" y1="{at}" y2="{at}" {stroke}/>')
            text += f" [{d.low:+.4g}, {d.high:+.4g}], {d.n} pairs"
        parts.append(f'<circle cx="{x(d.mean)}" cy="{at}" r="5" fill="{colors[group]}"><title>{text}</title></circle>')
    return _svg(bottom + _BOTTOM - 8, parts)


def _row_scale(rows: Mapping[str, object], low: float, high: float) -> tuple[_Scale, float]:
    left = min(170.0, 18 + 6.6 * max(len(group) for group in rows))
    pad = 0.06 * (high - low)
    return _Scale(low - pad, high + pad, left, _WIDTH - _RIGHT - 6), left


def _row_label(group: str, left: float, at: float) -> str:
    room = int((left - 12) / 6.2)
    shown = group if len(group) <= room else group[: room - 1] + "…"
    return f'<text class="group" x="{left - 12}" y="{at + 4}" text-anchor="end">{escape(shown)}</text>'


def _row_axis(x: _Scale, rows: int) -> list[str]:
    parts, bottom = [], _TOP + rows * _ROW
    for value in ticks(x.low, x.high):
        parts.append(f'<line class="grid" x1="{x(value)}" x2="{x(value)}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x(value)}" y="{bottom + 15}" text-anchor="middle">{number(value)}</text>')
    return parts


def _svg(height: float, parts: Sequence[str], attributes: str = "") -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img"{attributes}>{"".join(parts)}</svg>'
