"""Tables learnt from the model's packing code, against that code on random features."""

import functools
import math

import numpy as np
import pytest
import torch
import vlm_tiny as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from vlm_accel.encoders.anyres import Packing, spread
from vlm_accel.encoders.grids import Grids, Picture
from vlm_accel.encoders.layout import fill

SIDE = (4, 4)
NEXT = (("vision_feature_select_strategy", "default"),)


@functools.cache
def grids(name):
    return Grids(tiny.build(name).model)


def picture(name, size, aspect="anyres_max_9"):
    options = NEXT if name == "llava_next" else (("vision_aspect_ratio", aspect),)
    return Picture("tiles", grids(name).shape_of(size), size, options)


def packed_by_model(name, shown, features, newline):
    inner = grids(name).inner
    return inner.pack_image_features([features], [shown.size], image_newline=newline, **dict(shown.options))[0][0]


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@settings(deadline=None, max_examples=12)
@given(height=st.integers(8, 300), width=st.integers(8, 300), aspect=st.sampled_from([1, 2, 9]))
def test_rows_are_the_weighted_patches_that_the_table_names(name, height, width, aspect):
    shown = picture(name, (height, width), f"anyres_max_{aspect}")
    packing = grids(name).packing(shown, SIDE)
    features = torch.randn(shown.tiles, 16, 5, dtype=torch.float64)
    newline = torch.randn(5, dtype=torch.float64)
    expected = packed_by_model(name, shown, features, newline)
    assert packing.rows == len(expected)
    flat = features.flatten(0, 1).numpy()
    found = (flat[packing.source] * packing.weight[..., None].astype(float)).sum(1)
    found[packing.newline] = newline.numpy()
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(packing.weight.sum(1), 1.0 - packing.newline, atol=1e-5)
    assert packing.base.sum() == 16
    if not packing.pooled:
        real = packing.source[~packing.newline, 0]
        assert len(set(real)) == len(real)
    lines, columns = packing.size
    assert lines == 0 or lines * (columns + 1) + 16 == packing.rows  # 0: a sliver, all of it padding
    alive = packing.alive(torch.ones(shown.tiles * 16), None, lines * columns)
    assert alive.all()


def test_pooling_starts_where_the_model_pools():
    assert not grids("llava_onevision").packing(picture("llava_onevision", (56, 112)), SIDE).pooled
    assert grids("llava_onevision").packing(picture("llava_onevision", (56, 112), "anyres_max_1"), SIDE).pooled


def test_frames_are_pooled_as_the_model_does():
    for side in (3, 4, 5, 27):
        packing = grids("llava_onevision").packing(Picture("frame"), (side, side))
        features = torch.randn(1, side * side, 3, dtype=torch.float64)
        expected = grids("llava_onevision").pool(features, (side, side))[0].numpy()
        found = (features[0].numpy()[packing.source] * packing.weight[..., None]).sum(1)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert packing.pooled
        assert packing.size == (math.ceil(side / 2), math.ceil(side / 2))


def test_pooled_cells_stay_by_share_then_score_then_order():
    packing = grids("llava_onevision").packing(Picture("frame"), SIDE)  # cell (r, c) = patches of its 2 x 2 block
    assert packing.rows == 4
    alive = torch.zeros(16)
    alive[[0, 1, 4, 2, 10, 15]] = 1  # 3 of 4, 1 of 4, 0, 2 of 4
    assert packing.alive(alive, None, 2).tolist() == [True, False, False, True]
    alive[[3, 6, 7]] = 1  # now 3 of 4 becomes second to 4 of 4
    assert packing.alive(alive, None, 1).tolist() == [False, True, False, False]
    even = torch.zeros(16)
    even[[0, 2, 8, 10]] = 1
    assert packing.alive(even, None, 2).tolist() == [True, True, False, False]
    score = torch.zeros(16)
    score[[8, 10]] = torch.tensor([0.5, 0.25])
    assert packing.alive(even, score, 2).tolist() == [False, False, True, True]


def test_a_newline_stays_where_its_line_has_a_patch():
    shown = picture("llava_next", (56, 112))
    packing = grids("llava_next").packing(shown, SIDE)
    alive = torch.zeros(48)
    alive[[5, 16 + 4, 32 + 7, 32 + 12]] = 1  # base; second line twice; last line
    rows = packing.alive(alive, None, 0)
    assert rows[:16].nonzero().flatten().tolist() == [5]
    lines = rows[16:].unflatten(0, (4, 9))
    assert lines.sum(1).tolist() == [0, 3, 0, 2]
    assert lines[:, 8].tolist() == [False, True, False, True]
    alone = grids("llava_next").packing(Picture("tiles", (0, 0), (56, 56), NEXT), SIDE)
    assert alone.alive(torch.zeros(16), None, 0).nonzero().flatten().tolist() == [16]


@settings(deadline=None, max_examples=15)
@given(side=st.integers(1, 4), height=st.integers(20, 200), width=st.integers(20, 200), aspect=st.sampled_from([1, 9]))
def test_a_smaller_grid_is_spread_in_order_over_the_whole_run(side, height, width, aspect):
    shown = picture("llava_onevision", (height, width), f"anyres_max_{aspect}")
    known = grids("llava_onevision")
    large = known.packing(shown, SIDE)
    try:
        small = known.packing(shown, (side, side))
    except UserError:  # the model pools it to nothing
        assert side == 1
        return
    rows = spread(small, large, (side, side), SIDE)
    placed = rows >= 0
    assert len(rows) == small.rows
    assert (np.diff(rows[placed]) > 0).all()
    assert rows.max() < large.rows
    assert (large.base[rows[placed]] == small.base[placed]).all()
    assert (large.newline[rows[placed]] == small.newline[placed]).all()
    if small.size[0] <= large.size[0] and small.size[1] <= large.size[1]:
        assert placed.all() or not large.size[0]
    if side == 4:
        assert rows.tolist() == list(range(large.rows))


def test_lines_that_the_full_grid_lacks_are_left_out():
    known, shown = grids("llava_onevision"), picture("llava_onevision", (20, 56))
    small, large = known.packing(shown, (3, 3)), known.packing(shown, SIDE)
    assert (small.size, large.size) == ((3, 6), (2, 8))  # 2.1 lines rounded up by unpadding, 2.9 rounded down
    rows = spread(small, large, (3, 3), SIDE)
    assert (rows[9:].reshape(3, 7) >= 0).all(1).tolist() == [True, False, True]
    assert rows[9:16].tolist() == [16 + int((column + 0.5) * 8 / 6) for column in range(6)] + [24]
    features = torch.randn(small.rows, 2)
    full = known.placed(shown, (3, 3), SIDE, features)
    assert torch.equal(full[rows[rows >= 0]], features[torch.from_numpy(rows >= 0)])
    assert (full.abs().sum(1) > 0).sum() == 9 + 2 * 7


def test_cells_of_a_smaller_grid_sit_in_the_middle_of_what_they_cover():
    known, shown = grids("llava_next"), picture("llava_next", (56, 112))
    rows = spread(known.packing(shown, (2, 2)), known.packing(shown, SIDE), (2, 2), SIDE)
    base, lines = rows[:4].tolist(), [[16 + 9 * line + column for column in (1, 3, 5, 7, 8)] for line in (1, 3)]
    assert base == [5, 7, 13, 15]
    assert rows[4:].tolist() == lines[0] + lines[1]


def test_filled_cells_are_survivors_owners_or_the_nearest():
    x = torch.arange(3.0).reshape(1, 3, 1) + 1
    index = torch.tensor([[0, 5, 8]])
    owner = torch.tensor([[0, -1, 2, -1, -1, 1, -1, 0, 2]])
    made = fill(x, index, owner, (3, 3))[0, :, 0]
    #        nearest of (0,0) (1,2) (2,2): cell 1 -> 0; 3 -> 0; 4 -> 5 (distance 1); 6 -> 0 and 8 are both 2 away: first
    assert made.tolist() == [1, 1, 3, 1, 2, 2, 1, 1, 3]
    assert fill(x, index, None, (3, 3))[0, :, 0].tolist() == [1, 1, 2, 1, 2, 2, 1, 3, 3]


def test_a_plain_picture_is_its_patches_in_order():
    packing = Packing.of(lambda features, _: features[0], (3, 5), (0, 0))
    assert packing.source[:, 0].tolist() == list(range(15))
    assert packing.base.all()
    assert packing.alive(torch.eye(15)[4], None, 0).nonzero().flatten().tolist() == [4]


def test_how_many_pooled_cells_stay():
    known, frame = grids("llava_onevision"), Picture("frame")
    assert known.cells(frame, (27, 27), [729]) == 196
    assert known.cells(frame, (27, 27), [361]) == 100  # 19 -> ceil 10, as published
    assert known.cells(frame, (27, 27), [169]) == 49
    assert known.cells(frame, (27, 27), [350]) == 100  # no square: ceil(27 sqrt(350 / 729) / 2) = 10
    shown = picture("llava_onevision", (112, 112), "anyres_max_1")
    assert known.cells(shown, SIDE, [16] * 5) == 16
    assert known.cells(shown, SIDE, [16, 9, 9, 9, 9]) == 9
    assert known.cells(shown, SIDE, [3, 5, 2, 4, 1]) == 1
