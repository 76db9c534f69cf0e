"""Draws and writes the shapes world of :mod:`css.data.shapes`: pictures of textured shapes with exact masks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from polymodal.seeding import numpy_rng

from css.data.base import SPLITS
from css.data.files import palette
from css.data.shapes import KINDS

__all__ = ["LOOKS", "Look", "draw_picture", "outline", "write_world"]

_PLACES = 20
_DRAWN = ("classes", "size", "noise", "scatter", "most")
"""options that a picture depends on, beside the seed"""
_COVERED = 0.15
"""largest share of an earlier shape that a later one may hide"""
_RADIUS = (0.14, 0.25)
"""of the circle around a shape, in picture sides"""


@dataclass(frozen=True)
class Look:
    """What the surface of a class looks like.

    Args:
        colour: mean RGB, 0..1.
        pattern: what varies over the surface.
        period: of the pattern, in picture sides.
        contrast: amplitude of the pattern, 0..1.
    """

    colour: tuple[float, float, float]
    pattern: Literal["stripes", "checks", "rings"]
    period: float
    contrast: float


LOOKS: dict[str, Look] = {
    "disc": Look((0.72, 0.42, 0.36), "stripes", 0.10, 0.18),
    "square": Look((0.42, 0.64, 0.40), "checks", 0.14, 0.16),
    "triangle": Look((0.40, 0.46, 0.72), "rings", 0.11, 0.18),
    "cross": Look((0.68, 0.60, 0.34), "stripes", 0.06, 0.16),
    "ring": Look((0.62, 0.40, 0.64), "checks", 0.10, 0.18),
    "bar": Look((0.36, 0.62, 0.64), "rings", 0.08, 0.16),
    "half_disc": Look((0.60, 0.58, 0.58), "checks", 0.08, 0.20),
    "star": Look((0.54, 0.48, 0.34), "stripes", 0.14, 0.18),
}
"""Looks by name of the class; neighbours in this table overlap in colour once shapes scatter."""


def outline(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where a shape is, in its own coordinates: the circle around it has radius 1.

    Args:
        kind: one of ``KINDS``.
        u: coordinate to the right, any shape of array.
        v: coordinate downwards, same shape.

    Returns:
        Boolean array of that shape.
    """
    radius = np.hypot(u, v)
    if kind == "disc":
        return radius <= 0.9
    if kind == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.75
    if kind == "triangle":
        return (v <= 0.5) & (v >= np.sqrt(3) * np.abs(u) - 1)
    if kind == "cross":
        return (np.minimum(np.abs(u), np.abs(v)) <= 0.3) & (np.maximum(np.abs(u), np.abs(v)) <= 0.95)
    if kind == "ring":
        return (radius <= 1) & (radius >= 0.5)
    if kind == "bar":
        return (np.abs(u) <= 0.95) & (np.abs(v) <= 0.35)
    if kind == "half_disc":
        return (radius <= 1) & (v <= 0.1)
    return radius <= 0.65 + 0.35 * np.cos(5 * np.arctan2(v, u))  # star


def _pattern(look: Look, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Values -1..1 over coordinates in picture sides, from a random phase."""
    first, second = rng.uniform(0, 2 * np.pi, 2)
    turn = 2 * np.pi / (look.period * rng.uniform(0.85, 1.15))
    if look.pattern == "stripes":
        return np.sin(turn * u + first)
    if look.pattern == "checks":
        return np.sign(np.sin(turn * u + first) * np.sin(turn * v + second))
    return np.sin(turn * np.hypot(u, v) + first)


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size, 3): patches of colour that run into each other, under faint stripes."""
    grid = 5
    patches = rng.uniform(0.3, 0.7, 3) + rng.normal(0, 0.11, (grid, grid, 3))
    place = np.linspace(0, grid - 1, size)
    weight = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(grid)))  # linear interpolation
    picture = np.moveaxis(weight @ np.moveaxis(patches, 2, 0) @ weight.T, 0, 2)
    y, x = np.mgrid[:size, :size] / size
    angle = rng.uniform(0, np.pi)
    turn = 2 * np.pi / rng.uniform(0.06, 0.25)
    stripes = np.sin(turn * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 2 * np.pi))
    striped: np.ndarray = picture + rng.uniform(0.02, 0.10) * stripes[..., None]
    return striped


def _place(kind: str, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Outline of a shape at a free place, and its own coordinates in picture sides; None where none was found."""
    size = len(mask)
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    labels, areas = np.unique(mask[mask > 0], return_counts=True)
    for _ in range(_PLACES):
        radius = rng.uniform(*_RADIUS)
        top, left = rng.uniform(radius * 0.9, 1 - radius * 0.9, 2)
        angle = rng.uniform(0, 2 * np.pi)
        u = np.cos(angle) * (x - left) + np.sin(angle) * (y - top)
        v = -np.sin(angle) * (x - left) + np.cos(angle) * (y - top)
        inside = outline(kind, u / radius, v / radius)
        hidden = np.array([np.count_nonzero(mask[inside] == label) for label in labels])
        if (hidden <= _COVERED * areas).all():
            return inside, u, v
    return None


def draw_picture(
    classes: int, size: int, noise: float, scatter: float, rng: np.random.Generator, most: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """One picture with one to ``most`` shapes of any classes.

    Args:
        classes: number of classes to draw from.
        size: height and width, pixels.
        noise: standard deviation of the pixel noise, 0..1.
        scatter: standard deviation of a shape's colour about that of its class, 0..1.
        rng: generator of this picture.
        most: most shapes.

    Returns:
        Picture (size, size, 3) uint8 and mask (size, size) uint8 with raw ids.
    """
    picture = _background(size, rng)
    mask = np.zeros((size, size), np.uint8)
    for _ in range(int(rng.integers(1, most + 1))):
        label = int(rng.integers(1, classes + 1))
        kind = KINDS[label - 1]
        placed = _place(kind, mask, rng)
        if placed is None:
            continue
        inside, u, v = placed
        look = LOOKS[kind]
        colour = np.asarray(look.colour) + rng.normal(0, scatter, 3)
        surface = colour + look.contrast * _pattern(look, u, v, rng)[..., None]
        picture[inside] = surface[inside]
        mask[inside] = label
    picture = np.clip(picture + rng.normal(0, noise, picture.shape), 0, 1)
    return np.rint(255 * picture).astype(np.uint8), mask


def write_world(folder: Path, options: dict[str, Any]) -> None:
    """Write a whole world into an empty folder; ``world.json`` comes last.

    Args:
        folder: existing empty folder.
        options: as :meth:`css.data.shapes.Shapes.options` gives them.
    """
    from PIL import Image

    colours = palette().tobytes()
    for split, count in zip(SPLITS, options["images"], strict=True):
        for part in ("images", "masks"):
            (folder / split / part).mkdir(parents=True)
        for number in range(count):
            name = f"shapes-{split}-{number:05d}"
            rng = numpy_rng(options["seed"], "picture", name)
            picture, mask = draw_picture(**{key: options[key] for key in _DRAWN}, rng=rng)
            Image.fromarray(picture).save(folder / split / "images" / f"{name}.png", compress_level=1)
            indexed = Image.fromarray(mask)
            indexed.putpalette(colours)
            indexed.save(folder / split / "masks" / f"{name}.png", compress_level=1)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in KINDS[: options["classes"]]), encoding="utf-8")
    (folder / "world.json").write_text(json.dumps(options), encoding="utf-8")
