"""Pictures of merge maps: which patches survived, which token each ended in, what they were worth (iLLaVA 4.4).

Drawn from the map and the picture alone. One column a step, one row a picture; a picture of several tiles (anyres) or
frames (video) has one row a tile. Newlines and other rows that are no patches are not drawn. Figures are made without
pyplot: no global state, no window, any thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from polymodal.errors import UserError
from polymodal.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from vlm_accel.merge_map import MergeMap

__all__ = ["plot_owners", "plot_score", "plot_survivors", "save_pictures", "show", "tile_pictures"]

_SCHEMA = 1
_INCHES = 2.2
_DPI = 100
_GOLDEN = 0.618033988749895
_TITLES = {"survivors": "survivors", "owners": "final token", "score": "score"}


def show(image: Any, merge_map: MergeMap, tiles: tuple[int, int] | None = None) -> Figure:
    """Survivors, owners and scores of every step, over the picture.

    Args:
        image: a picture (PIL, array (H, W, 3) or (H, W), tensor), or a list of them, one a tile or frame of the map.
        merge_map: of that picture.
        tiles: (rows, columns) of an anyres picture: the first tile is the whole picture, the others are its parts.

    Returns:
        a figure with three rows a tile and one column a step.

    Raises:
        UserError: a map without steps, or pictures that do not fit its tiles.
    """
    _check(merge_map)
    pictures = _pictures(image, merge_map, tiles)
    kinds = [(kind, tile) for tile in range(len(pictures)) for kind in _TITLES]
    figure, axes = _figure(len(kinds), len(merge_map.steps), merge_map)
    for row, (kind, tile) in enumerate(kinds):
        for step in range(len(merge_map.steps)):
            _DRAW[kind](axes[row][step], pictures[tile], merge_map, step, tile)
        axes[row][0].set_ylabel(_TITLES[kind] if len(pictures) == 1 else f"tile {tile}: {_TITLES[kind]}", fontsize=8)
    _headings(axes[0], merge_map)
    return figure


def plot_survivors(images: Any, maps: MergeMap | Sequence[MergeMap], tiles: tuple[int, int] | None = None) -> Figure:
    """Removed patches darkened, one row a picture (or tile), one column a step; arguments as for ``show``, or lists."""
    return _plot("survivors", images, maps, tiles)


def plot_owners(images: Any, maps: MergeMap | Sequence[MergeMap], tiles: tuple[int, int] | None = None) -> Figure:
    """Patches coloured by the token they ended in, lines where it changes, hatching where they went nowhere."""
    return _plot("owners", images, maps, tiles)


def plot_score(images: Any, maps: MergeMap | Sequence[MergeMap], tiles: tuple[int, int] | None = None) -> Figure:
    """The score of each row before the step, at its place; blank where no row stands any more."""
    return _plot("score", images, maps, tiles)


def save_pictures(
    folder: str | Path, name: str, image: Any, merge_map: MergeMap, tiles: tuple[int, int] | None = None
) -> list[Path]:
    """Write ``{name}_{stage}_{layer}.png`` for each step and ``{name}.json`` with what is drawn.

    The JSON file has ``grid`` (tiles, height, width), ``prefix``, ``group``, and per step ``stage``, ``layer``,
    ``n_in``, ``n_out``, ``survivors`` (patch numbers, tile after tile in raster order), ``owner`` (per patch the row it
    ended in, -1: nowhere), ``score`` (per row before the step; null: none).

    Returns:
        the files, JSON last.

    Raises:
        UserError: as ``show``; a name with a path in it.
    """
    if not name or Path(name).name != name:
        raise UserError(f"name {name!r} of the pictures; expected a plain file name without folders")
    _check(merge_map)
    pictures = _pictures(image, merge_map, tiles)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for step, one in enumerate(merge_map.steps):
        figure, axes = _figure(len(pictures), len(_TITLES), merge_map)
        for tile, picture in enumerate(pictures):
            for column, kind in enumerate(_TITLES):
                _DRAW[kind](axes[tile][column], picture, merge_map, step, tile)
        for column, title in enumerate(_TITLES.values()):
            axes[0][column].set_title(title, fontsize=8)
        axes[0][0].set_title(f"survivors: {one.n_in} to {one.n_out} rows", fontsize=8)
        path = folder / f"{name}_{one.stage}_{one.layer}.png"
        _save(figure, path)
        written.append(path)
    path = folder / f"{name}.json"
    text = json.dumps(_as_json(merge_map))
    atomic_write(path, lambda handle: handle.write(text.encode()))
    return [*written, path]


def tile_pictures(pixel_values: Any, mean: Sequence[float], std: Sequence[float]) -> list[NDArray[Any]]:
    """Pictures of the tiles exactly as the encoder saw them, padding included.

    Args:
        pixel_values: (tiles, 3, height, width) normalised pixels, as a processor makes them.
        mean: of the normalisation, per channel.
        std: likewise.

    Returns:
        one (height, width, 3) array in [0, 1] a tile.
    """
    pixels = np.asarray(_plain(pixel_values), dtype=np.float64)
    if pixels.ndim != 4 or pixels.shape[1] != len(mean):
        raise UserError(f"pixel_values of shape {pixels.shape}; expected (tiles, {len(mean)}, height, width)")
    pixels = pixels * np.reshape(std, (1, -1, 1, 1)) + np.reshape(mean, (1, -1, 1, 1))
    return list(pixels.transpose(0, 2, 3, 1).clip(0, 1))


def _plot(kind: str, images: Any, maps: MergeMap | Sequence[MergeMap], tiles: tuple[int, int] | None) -> Figure:
    """One kind of panel for several pictures."""
    single = not isinstance(maps, Sequence)
    pairs = [(images, maps)] if single else list(zip(images, maps, strict=True))  # type: ignore[arg-type]
    rows: list[tuple[Any, Any, int]] = []
    for image, merge_map in pairs:
        _check(merge_map)  # type: ignore[arg-type]
        pictures = _pictures(image, merge_map, tiles)  # type: ignore[arg-type]
        rows += [(picture, merge_map, tile) for tile, picture in enumerate(pictures)]
    columns = max(len(merge_map.steps) for _, merge_map, _ in rows)
    figure, axes = _figure(len(rows), columns, rows[0][1])
    for line, (picture, merge_map, tile) in zip(axes, rows, strict=True):
        for step, axis in enumerate(line):
            if step < len(merge_map.steps):
                _DRAW[kind](axis, picture, merge_map, step, tile)
            else:
                axis.set_axis_off()
    _headings(axes[0], rows[0][1])
    return figure


def _check(merge_map: MergeMap) -> None:
    if not merge_map.steps:
        raise UserError("the merge map has no steps: nothing was merged; use a ratio below 1")


def _plain(image: Any) -> Any:
    """A tensor on any device, a PIL image or an array, as something NumPy reads."""
    if not hasattr(image, "detach"):
        return image
    image = image.detach().cpu()
    return (image.double() if image.is_floating_point() else image).numpy()


def _pictures(image: Any, merge_map: MergeMap, tiles: tuple[int, int] | None) -> list[NDArray[Any]]:
    """One (H, W, 3) array in [0, 1] for each tile of the map."""
    count = merge_map.grid[0]
    if isinstance(image, list | tuple):
        pictures = [_colour(one) for one in image]
    elif count == 1:
        pictures = [_colour(image)]
    elif tiles is not None:
        whole = _colour(image)
        strips = np.array_split(whole, tiles[0], axis=0)
        pictures = [whole, *(part for strip in strips for part in np.array_split(strip, tiles[1], axis=1))]
    else:
        raise UserError(f"the map has {count} tiles; give a list of {count} pictures, or tiles=(rows, columns)")
    if len(pictures) != count:
        raise UserError(f"{len(pictures)} pictures for a map of {count} tiles; they must be equal in number")
    return pictures


def _colour(image: Any) -> NDArray[Any]:
    pixels = np.asarray(_plain(image))
    whole = pixels.dtype.kind in "iu"
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, 2)
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        raise UserError(f"a picture of shape {pixels.shape}; expected (height, width, 3), (height, width) or PIL")
    pixels = pixels[..., :3].astype(np.float64)
    return (pixels / 255 if whole else pixels).clip(0, 1)


def _figure(rows: int, columns: int, merge_map: MergeMap) -> tuple[Figure, list[list[Axes]]]:
    """A figure of panels as high as the grid asks for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as NewFigure

    _, height, width = merge_map.grid
    figure = NewFigure(figsize=(_INCHES * columns + 0.3, _INCHES * rows * height / width + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [list(line) for line in figure.subplots(rows, columns, squeeze=False)]


def _headings(axes: Sequence[Axes], merge_map: MergeMap) -> None:
    for axis, step in zip(axes, merge_map.steps, strict=False):
        axis.set_title(f"{step.stage} {step.layer}: {step.n_in} to {step.n_out}", fontsize=8)


def _save(figure: Figure, path: Path) -> None:
    # no date and no version in the file: the same map gives the same bytes
    atomic_write(path, lambda handle: figure.savefig(handle, format="png", dpi=_DPI, metadata={"Software": None}))


def _base(axis: Axes, picture: NDArray[Any], merge_map: MergeMap, faded: float = 0.0) -> None:
    """The picture, in patch units."""
    _, height, width = merge_map.grid
    axis.imshow(picture * (1 - faded) + faded, extent=(0, width, height, 0), interpolation="bilinear")
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)
    axis.set_xticks([])
    axis.set_yticks([])


def _of_tile(values: NDArray[Any], merge_map: MergeMap, tile: int) -> NDArray[Any]:
    return values.reshape(merge_map.grid)[tile]


def _draw_survivors(axis: Axes, picture: NDArray[Any], merge_map: MergeMap, step: int, tile: int) -> None:
    gone = ~_of_tile(merge_map.survivors(step), merge_map, tile)
    _base(axis, picture, merge_map)
    cover = np.zeros((*gone.shape, 4))
    cover[..., 3] = gone * 0.85
    axis.imshow(cover, extent=(0, gone.shape[1], gone.shape[0], 0), interpolation="nearest")


def _draw_owners(axis: Axes, picture: NDArray[Any], merge_map: MergeMap, step: int, tile: int) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import hsv_to_rgb

    owner = _of_tile(merge_map.owner(step), merge_map, tile)
    height, width = owner.shape
    _base(axis, picture, merge_map, faded=0.4)
    hue = (owner * _GOLDEN) % 1
    colour = np.dstack([hsv_to_rgb(np.dstack([hue, np.full_like(hue, 0.75), np.full_like(hue, 0.95)])), owner >= 0])
    colour[..., 3] *= 0.55
    axis.imshow(colour, extent=(0, width, height, 0), interpolation="nearest")
    rows, columns = np.nonzero(owner[:, 1:] != owner[:, :-1])
    lines = [((c + 1, r), (c + 1, r + 1)) for r, c in zip(rows, columns, strict=True)]
    rows, columns = np.nonzero(owner[1:] != owner[:-1])
    lines += [((c, r + 1), (c + 1, r + 1)) for r, c in zip(rows, columns, strict=True)]
    axis.add_collection(LineCollection(lines, colors="black", linewidths=0.5))
    if (owner < 0).any():
        nowhere = np.ma.masked_where(owner >= 0, np.ones_like(owner))
        axis.pcolor(np.arange(width + 1), np.arange(height + 1), nowhere, hatch="////", alpha=0)


def _draw_score(axis: Axes, picture: NDArray[Any], merge_map: MergeMap, step: int, tile: int) -> None:
    _base(axis, picture, merge_map, faded=0.8)
    place = _places(merge_map, step)
    score = merge_map.steps[step].score
    if score is None:
        axis.text(0.5, 0.5, "no score", transform=axis.transAxes, ha="center", va="center", color="white")
        return
    cells = np.full(merge_map.rows, np.nan)
    cells[place[place >= 0]] = np.asarray(score, dtype=np.float64)[place >= 0]
    values = _of_tile(cells[merge_map.cell_of_patch()], merge_map, tile)
    axis.imshow(np.ma.masked_invalid(values), extent=(0, values.shape[1], values.shape[0], 0), interpolation="nearest")


def _places(merge_map: MergeMap, step: int) -> NDArray[Any]:
    """Source row of each row that enters ``step``."""
    return merge_map.positions(step - 1) if step > 0 else np.arange(merge_map.rows)


_DRAW: dict[str, Callable[[Axes, NDArray[Any], MergeMap, int, int], None]] = {
    "survivors": _draw_survivors, "owners": _draw_owners, "score": _draw_score,
}  # fmt: skip


def _as_json(merge_map: MergeMap) -> dict[str, Any]:
    steps = []
    for number, step in enumerate(merge_map.steps):
        score = None if step.score is None else [round(float(value), 6) for value in step.score]
        steps.append(
            {
                "stage": step.stage, "layer": step.layer, "n_in": step.n_in, "n_out": step.n_out,
                "survivors": np.nonzero(merge_map.survivors(number))[0].tolist(),
                "owner": merge_map.owner(number).tolist(), "score": score,
            }
        )  # fmt: skip
    return {
        "schema": _SCHEMA, "grid": list(merge_map.grid), "prefix": merge_map.prefix, "group": merge_map.group,
        "steps": steps,
    }  # fmt: skip
