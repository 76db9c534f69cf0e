"""The pictures: PNG files of the right size whose pixels depend on the data."""

import io

import numpy as np
import pytest
from fedcore import figures
from fedcore.landscape import Surface
from PIL import Image
from polymodal.errors import UserError


def pixels(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(int)


def has_colour(image: np.ndarray, code: str, within: int = 12) -> bool:
    wanted = [int(code[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(image - wanted).max(axis=2) <= within).any())


def test_curves_draw_every_group_and_the_band():
    lines = [[(r, 0.1 * r + s) for r in range(1, 6)] for s in (0.0, 0.3)]
    alone = pixels(figures.curves({"fedavg": lines}))
    assert has_colour(alone, "#2563a8")
    assert not has_colour(alone, "#d1660f")
    both = pixels(figures.curves({"fedavg": lines, "fedswa": lines[:1]}, target=0.5, title="digits"))
    assert has_colour(both, "#d1660f")
    assert not np.array_equal(alone, pixels(figures.curves({"fedavg": lines[:1]})))


def test_curves_need_a_value():
    with pytest.raises(UserError, match="no curve"):
        figures.curves({"fedavg": [[]]})


def test_same_data_same_picture():
    lines = {"fedavg": [[(1, 0.2), (2, 0.4)]]}
    assert figures.curves(lines) == figures.curves(lines)


def test_client_accuracy():
    image = pixels(figures.client_accuracy({"fedavg": [0.2, 0.9, 0.5], "fedmoswa": [0.7, 0.8, 0.9]}))
    assert has_colour(image, "#2563a8")
    assert has_colour(image, "#d1660f")
    with pytest.raises(UserError, match="fedavg"):
        figures.client_accuracy({"fedavg": []})


def test_label_counts_leave_empty_cells_white():
    counts = np.zeros((4, 3), dtype=int)
    counts[:2] = [[5, 0, 0], [0, 7, 1]]
    image = pixels(figures.label_counts(counts))
    full = pixels(figures.label_counts(np.full((4, 3), 5)))
    assert image.shape == full.shape
    white = (image == 255).all(axis=2).mean()
    assert white > (full == 255).all(axis=2).mean() + 0.2


@pytest.mark.parametrize("counts", [np.zeros((3,)), np.full((2, 2), -1), np.zeros((0, 3))])
def test_label_counts_refuse_other_tables(counts):
    with pytest.raises(UserError, match="label counts"):
        figures.label_counts(counts)
    with pytest.raises(UserError, match="2 class names"):
        figures.label_counts(np.ones((2, 3)), class_names=["a", "b"])


def test_surface():
    grid = tuple(np.linspace(-1, 1, 9))
    bowl = tuple(tuple(a * a + 4 * b * b for b in grid) for a in grid)
    assert has_colour(pixels(figures.surface(Surface(grid, grid, bowl))), "#d1660f")
    with pytest.raises(UserError, match="flat"):
        figures.surface(Surface(grid, grid, tuple((1.0,) * 9 for _ in grid)))
    holes = (((float("inf"),) * 9), *bowl[1:])
    assert pixels(figures.surface(Surface(grid, grid, holes))).size
