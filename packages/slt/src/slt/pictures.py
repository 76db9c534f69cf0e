"""A translated clip as one picture: the question's words, the frames, and what each translated word rests on."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from polymodal.errors import UserError
from polymodal.files import atomic_write

from slt.data.landmarks import SECTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from slt.explain import Explanation

__all__ = ["check_picture", "draw_translation", "save_picture"]

FORMATS = (".png", ".svg", ".pdf", ".jpg")
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a3d9a", "#7a7a00")
_INK, _GREY, _LIGHT = "#1c1c28", "#6b7080", "#d9dce3"
_WIDTH, _MARGIN = 10.0, 0.55
_FINGERS = [(0, 1, 2, 3, 4), *((0, *range(k, k + 4)) for k in (5, 9, 13, 17))]
_ARMS = [(0, 1), (0, 2), (1, 2), (1, 3), (3, 5), (2, 4), (4, 6)]
_WRISTS = {"left": 5, "right": 6}
_HAND_SIZE = 0.5
_CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei")
_log = logging.getLogger(__name__)


def check_picture(path: Path) -> None:
    """Refuse a picture file that could not be written, before anything is computed.

    Raises:
        UserError: unknown ending, or no such folder.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--picture {path}: expected a name that ends in {', '.join(FORMATS)}")
    if not path.expanduser().absolute().parent.is_dir():
        raise UserError(f"--picture {path}: the folder {path.parent} does not exist; make it first")


def save_picture(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Write a figure in the format that the name's ending says; the file appears whole or not at all."""
    buffer = io.BytesIO()
    with _without_glyph_warnings():
        figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=dpi, facecolor="white")
    atomic_write(path.expanduser(), lambda handle: handle.write(buffer.getvalue()))


@contextlib.contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """Missing characters are told once, in words (see ``_fonts``), and not once for each of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def draw_translation(
    explanation: Explanation,
    frames: np.ndarray,
    numbers: Sequence[int],
    *,
    question: str = "",
    without_question: str | None = None,
    local_hands: bool = False,
) -> Figure:
    """Draw one clip: words in colours, the film strip, evidence of question words and frames, weights of the fusion.

    Args:
        explanation: weights and evidence.
        frames: what the model saw: (T, H, W, 3) uint8, or (T, P, 4) landmarks x, y, z, valid.
        numbers: number of each frame in the clip, T of them.
        question: the question; empty where there was none.
        without_question: translation without a question, to be shown for comparison.
        local_hands: hand landmarks are relative to the wrist, in hand lengths.

    Returns:
        A matplotlib figure that belongs to no window.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    fonts = _fonts([*explanation.words, question])
    with rc_context({"font.family": fonts, "font.size": 10, "text.color": _INK}), _without_glyph_warnings():
        has_words, has_signs = bool(explanation.question), len(explanation.sign_evidence) > 0
        shares = [w for w, there in ((_question_share(explanation), has_words), (1.0, has_signs)) if there] or [1.0]
        plot_width = _WIDTH - _MARGIN - 0.25 - (0.55 if len(shares) == 2 else 0.0)
        strip = _strip_layout(frames, plot_width * (shares[-1] / sum(shares))) if has_signs else (0, 0.3)
        heights = [strip[1], 1.5, 0.95] if _has_weights(explanation) else [strip[1], 1.5]
        top, bottom, gap = 1.25 if question else 0.7, 0.95, 0.16
        total = top + sum(heights) + gap * (len(heights) - 1) + bottom
        figure = Figure(figsize=(_WIDTH, total))
        grid = figure.add_gridspec(
            len(heights),
            len(shares),
            height_ratios=heights,
            width_ratios=shares,
            left=_MARGIN / _WIDTH,
            right=1 - 0.25 / _WIDTH,
            top=1 - top / total,
            bottom=bottom / total,
            hspace=gap / (sum(heights) / len(heights)),
            wspace=0.55 / (plot_width / len(shares)) if len(shares) == 2 else 0.0,
        )
        colours = _colours(len(explanation.words))
        _headline(figure, explanation.words, colours, question, without_question, total)
        if has_words:
            _question_column(figure, [grid[row, 0] for row in range(len(heights))], explanation, colours)
        if has_signs:
            cells = [grid[row, len(shares) - 1] for row in range(len(heights))]
            _frame_column(figure, cells, explanation, colours, frames, numbers, strip[0], local_hands)
        _caption(figure, explanation, total)
    return figure


def _has_weights(explanation: Explanation) -> bool:
    return explanation.question_weights is not None or explanation.sign_weights is not None


def _question_share(explanation: Explanation) -> float:
    """Width of the column of words in widths of the column of frames."""
    letters = sum(max(3, len(word)) + 1 for word in explanation.question)
    return min(1.0, max(0.28, letters / 70))


def _colours(count: int) -> list[Any]:
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    from matplotlib import colormaps

    bright = [colormaps["turbo"](0.05 + 0.9 * i / (count - 1)) for i in range(count)]
    return [(0.78 * red, 0.78 * green, 0.78 * blue) for red, green, blue, _ in bright]


def _fonts(texts: Sequence[str]) -> list[str]:
    """A font with Chinese characters behind the usual one, where they are needed."""
    families = ["DejaVu Sans"]
    if any(ord(character) > 0x2E7F for text in texts for character in text):
        from matplotlib import font_manager

        known = set(font_manager.get_font_names())
        found = [name for name in _CJK_FONTS if name in known]
        if not found:
            _log.warning("no font with Chinese characters is installed (e.g. Noto Sans CJK); they are drawn as boxes")
        families += found[:1]
    return families


# ------------------------------------------------------------------ text


def _headline(
    figure: Figure, words: Sequence[str], colours: Sequence[Any], question: str, without: str | None, total: float
) -> None:
    """The question, the translation with one colour a word, and what comes out without the question."""
    y = total - 0.34
    if question:
        _say(figure, [("question  ", _GREY, "normal"), (question, _INK, "normal")], y, total, 10)
        y -= 0.36
    joint = "" if all(len(word) == 1 for word in words) and len(words) > 1 else " "
    parts = [(word + joint, colour, "bold") for word, colour in zip(words, colours, strict=True)]
    _say(figure, parts, y, total, 15)
    if without is not None:
        _say(figure, [(f"without the question  {without or '(nothing)'}", _GREY, "normal")], y - 0.3, total, 10)


def _say(figure: Figure, parts: Sequence[tuple[str, Any, str]], y: float, total: float, size: int) -> None:
    """One line of text in several colours, made smaller where it would leave the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    room = _WIDTH - _MARGIN - 0.2
    while True:
        x, drawn = _MARGIN, []
        for text, colour, weight in parts:
            item = figure.text(x / _WIDTH, y / total, text, color=colour, weight=weight, size=size, va="baseline")
            drawn.append(item)
            x += item.get_window_extent(renderer).width / figure.dpi
        if x - _MARGIN <= room or size <= 5:
            return
        for item in drawn:
            item.remove()
        size = max(5, min(size - 1, int(size * room / (x - _MARGIN))))


def _caption(figure: Figure, explanation: Explanation, total: float) -> None:
    lines = [
        "evidence: fall of a translated word's log-probability (nats, in its colour) when a word of the question is "
        "left out, or the video is blanked around a frame"
    ]
    if _has_weights(explanation):
        lines.append(f"{explanation.weight_name}: mean weight that the fusion gives to a token, with its 10-90 % range")
    figure.text(_MARGIN / _WIDTH, 0.14 / total, "\n".join(lines), color=_GREY, size=7, va="bottom", linespacing=1.4)


# ------------------------------------------------------------------ columns


def _plain(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_LIGHT)
    axes.tick_params(colors=_GREY, labelsize=8, length=2)
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 2.5, 5, 10]))


def _weight_limit(explanation: Explanation) -> float:
    """Upper end of the weights' axis: 1 for gates, which is their bound."""
    tables = [t for t in (explanation.question_weights, explanation.sign_weights) if t is not None and len(t)]
    highest = max((float(t[:, [0, 2]].max()) for t in tables), default=1.0)
    return 1.15 * highest if 0.0 < highest <= 0.25 else 1.0


def _evidence_limit(explanation: Explanation) -> float:
    """Upper end of both evidence axes: one unit, one scale."""
    bars = np.maximum(0.0, explanation.question_evidence).sum(axis=1).max(initial=0.0)
    return max(0.5, 1.08 * float(max(bars, explanation.sign_evidence.max(initial=0.0))))


def _panels(
    figure: Figure,
    cells: Sequence[Any],
    explanation: Explanation,
    weights: np.ndarray | None,
    limits: tuple[float, float],
) -> tuple[Axes, Axes]:
    """Empty axes of a column's evidence and, below, of its weights: the same axes twice for a fusion without any."""
    evidence = lowest = figure.add_subplot(cells[1])
    evidence.set_ylim(0, _evidence_limit(explanation))
    if len(cells) > 2:
        evidence.tick_params(labelbottom=False)
        lowest = figure.add_subplot(cells[2])
        lowest.set_ylim(0, _weight_limit(explanation))
        if weights is None:
            lowest.text(0.5, 0.5, "no weights", transform=lowest.transAxes, color=_GREY, ha="center", size=8)
    for axes in {evidence, lowest}:
        _plain(axes)
        axes.set_xlim(*limits)
    return evidence, lowest


def _question_column(figure: Figure, cells: Sequence[Any], explanation: Explanation, colours: Sequence[Any]) -> None:
    places, weights = np.arange(len(explanation.question)), explanation.question_weights
    title = figure.add_subplot(cells[0])
    title.set_axis_off()
    title.text(0, 0.02, "words of the question", transform=title.transAxes, color=_GREY, size=8)
    evidence, lowest = _panels(figure, cells, explanation, weights, (-0.6, len(places) - 0.4))
    floor = np.zeros(len(places))
    for word, colour in enumerate(colours):
        height = np.maximum(0.0, explanation.question_evidence[:, word])
        evidence.bar(places, height, 0.62, bottom=floor, color=colour, linewidth=0)
        floor = floor + height
    evidence.set_ylabel("evidence", color=_GREY, size=8)
    if weights is not None:
        mean, low, high = weights.T
        lowest.bar(places, mean, 0.62, color=_LIGHT)
        lowest.vlines(places, low, high, color=_GREY, linewidth=1)
        lowest.set_ylabel(explanation.weight_name, color=_GREY, size=8)
    for axes in {evidence, lowest}:
        axes.set_xticks(places)
    room = lowest.get_position().width * _WIDTH / max(1, len(places))
    crowded = max(map(len, explanation.question)) * 0.085 > room
    lowest.set_xticklabels(explanation.question, color=_INK, size=9)
    if crowded:
        for label in lowest.get_xticklabels():
            label.set(rotation=40, ha="right")


def _frame_column(
    figure: Figure,
    cells: Sequence[Any],
    explanation: Explanation,
    colours: Sequence[Any],
    frames: np.ndarray,
    numbers: Sequence[int],
    pictures: int,
    local_hands: bool,
) -> None:
    count, weights = len(frames), explanation.sign_weights
    film = figure.add_subplot(cells[0])
    _film(film, frames, pictures, local_hands)
    evidence, lowest = _panels(figure, cells, explanation, weights, (-0.5, count - 0.5))
    edges = explanation.edges
    middles = np.concatenate([edges[:1], (edges[:-1] + edges[1:]) / 2, edges[-1:]])
    for word, colour in enumerate(colours):
        height = np.maximum(0.0, np.pad(explanation.sign_evidence[:, word], 1, mode="edge"))
        evidence.fill_between(middles, height, color=colour, alpha=0.25, linewidth=0)
        evidence.plot(middles, height, color=colour, linewidth=1.6)
    if weights is not None:
        mean, low, high = weights.T
        lowest.stairs(high, edges, baseline=low, fill=True, color=_LIGHT)
        lowest.stairs(mean, edges, color=_GREY, linewidth=1.6, baseline=None)
    step = max(1, round(count / 8))
    lowest.set_xticks(range(0, count, step), [str(numbers[i]) for i in range(0, count, step)])
    lowest.set_xlabel("frame", color=_GREY, size=8)
    if not explanation.question:
        evidence.set_ylabel("evidence", color=_GREY, size=8)
        if lowest is not evidence:
            lowest.set_ylabel(explanation.weight_name, color=_GREY, size=8)


# ------------------------------------------------------------------ film strip


def _strip_layout(frames: np.ndarray, width: float) -> tuple[int, float]:
    """How many pictures stand in the strip, and its height in inches, for pictures of their own proportions."""
    ratio = frames.shape[1] / frames.shape[2] if frames.ndim == 4 else 1.0
    pictures = max(1, min(len(frames), round(width / 0.62)))
    height = width / pictures * ratio
    return pictures, float(np.clip(height, 0.35, 1.4))


def _film(axes: Axes, frames: np.ndarray, pictures: int, local_hands: bool) -> None:
    """Evenly spaced frames, each as wide as the stretch of time it stands for."""
    count = len(frames)
    axes.set_axis_off()
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(0, 1)
    for number in range(pictures):
        left, right = count * number / pictures - 0.5, count * (number + 1) / pictures - 0.5
        frame = frames[min(count - 1, round((left + right) / 2))]
        inset = 0.02 * (right - left)
        box = (left + inset, right - inset, 0.0, 1.0)
        if frames.ndim == 4:
            small = frame.shape[0] <= 64
            axes.imshow(frame, extent=box, aspect="auto", interpolation="nearest" if small else "antialiased")
        else:
            _signer(axes, frame, box, local_hands)


def _signer(axes: Axes, points: np.ndarray, box: tuple[float, float, float, float], local_hands: bool) -> None:
    """Landmarks of one frame as lines, fitted into a box."""
    left, right, bottom, top = box
    lines = [points[list(pair)] for pair in _ARMS if len(points) > max(pair)]
    for side, wrist in _WRISTS.items():
        hand = points[SECTIONS[side]].copy()
        if local_hands:
            hand[:, :2] = points[wrist, :2] + _HAND_SIZE * hand[:, :2]
            hand[:, 3] *= points[wrist, 3] > 0
        lines += [hand[list(finger)] for finger in _FINGERS]
    axes.fill_between([left, right], bottom, top, color="#f2f3f6", linewidth=0)
    for line in lines:
        shown = line[line[:, 3] > 0]
        # Two and a half shoulder widths across, the shoulders in the upper half; y grows downwards in landmarks.
        x = left + (right - left) * (shown[:, 0] / 2.5 + 0.5)
        y = top - (top - bottom) * (shown[:, 1] / 2.5 + 0.4)
        axes.plot(x, y, color=_INK, linewidth=0.8, solid_capstyle="round", clip_on=True)
