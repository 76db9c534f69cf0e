"""Pictures of merge maps: what is drawn where, the files, tiles, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from polymodal.errors import UserError
from vlm_accel import show as promised
from vlm_accel.merge_map import MergeMap, MergeStep
from vlm_accel.show import plot_owners, plot_score, plot_survivors, save_pictures, show, tile_pictures


def step(kept, assign, score=None, stage="vision", layer=3):
    score = None if score is None else np.asarray(score, np.float32)
    kept, assign = np.asarray(kept, np.int32), np.asarray(assign, np.int32)
    return MergeStep(stage, layer, len(assign), len(kept), kept, assign, None, score)


@pytest.fixture
def one():
    """2 x 3 patches: patch 2 merges into patch 1, patch 5 goes nowhere; then only patches 0 and 4 remain."""
    return MergeMap(
        (1, 2, 3),
        prefix=1,
        steps=[
            step([0, 1, 3, 4], [0, 1, 1, 2, 3, -1], [6, 5, 2, 4, 3, 1]),
            step([0, 3], [0, 0, 1, 1], None, "llm", 2),
        ],
    )


def picture(height=40, width=60):
    return np.full((height, width, 3), 255, np.uint8)


def cover(axis):
    """Opacity of the topmost image of a panel."""
    return np.asarray(axis.images[-1].get_array())[..., 3]


def test_survivors_are_left_bright(one):
    figure = plot_survivors(picture(), one)
    first, second = figure.axes
    assert (cover(first) > 0).tolist() == [[False, False, True], [False, False, True]]
    assert (cover(second) > 0).tolist() == [[False, True, True], [True, False, True]]
    assert first.get_title() == "vision 3: 6 to 4"


def test_owners_share_a_colour_and_edges_stand_between(one):
    first, second = plot_owners(picture(), one).axes
    colour = np.asarray(first.images[-1].get_array())
    assert np.array_equal(colour[0, 1], colour[0, 2])
    assert not np.array_equal(colour[0, 0], colour[0, 1])
    assert colour[1, 2, 3] == 0
    edges = {tuple(map(tuple, segment)) for segment in first.collections[0].get_segments()}
    assert ((1, 0), (1, 1)) in edges
    assert ((2, 0), (2, 1)) not in edges
    hatched = [one for one in first.collections if one.get_hatch()]
    assert len(hatched) == 1
    assert np.ma.getmaskarray(hatched[0].get_array()).tolist() == [[True] * 3, [True, True, False]]
    # 0, 1, 2 end in token 0; 3 and 4 in token 1
    colour = np.asarray(second.images[-1].get_array())
    assert np.array_equal(colour[0, 0], colour[0, 2])
    assert np.array_equal(colour[1, 0], colour[1, 1])


def test_scores_stand_at_their_rows(one):
    one.steps[1].score = np.asarray([7, 8, 9, 10], np.float32)
    first, second = plot_score(picture(), one).axes
    assert np.asarray(first.images[-1].get_array()).tolist() == [[6, 5, 2], [4, 3, 1]]
    values = second.images[-1].get_array()
    assert values.filled(-1).tolist() == [[7, 8, -1], [9, 10, -1]]


def test_show_has_a_row_a_kind_and_a_column_a_step(one):
    figure = show(Image.fromarray(picture()), one)
    assert len(figure.axes) == 6
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == ["survivors", "final token", "score"]
    assert [text.get_text() for text in figure.axes[5].texts] == ["no score"]
    assert promised is show


def test_files_hold_what_is_drawn_and_are_the_same_each_time(one, tmp_path):
    files = save_pictures(tmp_path / "out", "cat", torch.ones(3, 40, 60), one)
    assert [path.name for path in files] == ["cat_vision_3.png", "cat_llm_2.png", "cat.json"]
    assert Image.open(files[0]).size[0] > 300
    held = json.loads(files[-1].read_text())
    assert held["grid"] == [1, 2, 3]
    assert held["steps"][0]["survivors"] == [0, 1, 3, 4]
    assert held["steps"][0]["score"] == [6, 5, 2, 4, 3, 1]
    assert held["steps"][1] == {
        "stage": "llm", "layer": 2, "n_in": 4, "n_out": 2, "survivors": [0, 4], "owner": [0, 0, 0, 1, 1, -1],
        "score": None,
    }  # fmt: skip
    before = files[0].read_bytes()
    save_pictures(tmp_path / "out", "cat", torch.ones(3, 40, 60), one)
    assert files[0].read_bytes() == before


def test_tiles_cells_and_newlines():
    """Three tiles of 2 x 2 patches in one cell each: the cell of tile 1 goes; a newline row is text, not drawn."""
    tiled = MergeMap((3, 2, 2), group=4, steps=[step([0, 2, -1], [0, -1, 1], [3, 1, 2], "splice", 0)])
    left, right = np.zeros((20, 20, 3), np.uint8), np.full((20, 20, 3), 255, np.uint8)
    whole = np.concatenate([left, right], 1)
    by_layout = plot_survivors(whole, tiled, tiles=(1, 2))
    by_tile = plot_survivors([whole, left, right], tiled)
    for figure in (by_layout, by_tile):
        assert [bool(cover(axis).all()) for axis in figure.axes] == [False, True, False]
        assert np.asarray(figure.axes[1].images[0].get_array()).max() == 0
        assert np.asarray(figure.axes[2].images[0].get_array()).min() == 1
    assert len(show(whole, tiled, tiles=(1, 2)).axes) == 9


def test_several_pictures_are_rows(one):
    short = MergeMap((1, 2, 3), steps=one.steps[:1])
    figure = plot_survivors([picture(), picture()], [one, short])
    assert len(figure.axes) == 4
    assert not figure.axes[3].axison


def test_tile_pictures_are_what_the_encoder_saw():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    shown = torch.rand(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift, scale = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    tiles = tile_pictures((shown - shift) / scale, mean, std)
    assert np.allclose(np.stack(tiles), shown.permute(0, 2, 3, 1).numpy())


def test_pixels_are_the_same_in_every_form(one):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = (pixels, Image.fromarray(pixels), tensor, tensor / 255, pixels / 255)
    shown = [np.asarray(plot_score(form, one).axes[0].images[0].get_array(), np.float64) for form in forms]
    assert all(np.allclose(form, shown[0], atol=1e-6) for form in shown)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (picture(), {}, "2 tiles; give a list of 2 pictures"),
        ([picture()], {}, "1 pictures for a map of 2 tiles"),
        (picture(), {"tiles": (2, 2)}, "5 pictures"),
        ([np.zeros((2, 3, 9)), picture()], {}, "picture of shape"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(image, options, message):
    tiled = MergeMap((2, 1, 2), steps=[step([0], [0, 0, 0, 0])])
    with pytest.raises(UserError, match=message):
        show(image, tiled, **options)


def test_maps_without_steps_names_with_folders_and_odd_pixels_are_refused(one, tmp_path):
    with pytest.raises(UserError, match="no steps"):
        show(picture(), MergeMap((1, 2, 3)))
    with pytest.raises(UserError, match="plain file name"):
        save_pictures(tmp_path, "../cat", picture(), one)
    with pytest.raises(UserError, match="pixel_values of shape"):
        tile_pictures(np.zeros((3, 4, 4)), (0, 0, 0), (1, 1, 1))
