"""One paste and the cells: float64 reference, torch's own resizing, and every invariant of the specification."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from css.ops.paste import cell_side, paste_instance, rank_cells, rank_cells_batch
from hypothesis import given, settings
from hypothesis import strategies as st

_spec = importlib.util.spec_from_file_location("_paste_reference", Path(__file__).with_name("_paste_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


def one_hot(labels, channels):
    """(S, H, W) rows; labels of S and above are ignored pixels: rows of zeros."""
    return torch.from_numpy(np.eye(channels + 1)[np.minimum(labels, channels)][..., :channels]).permute(2, 0, 1).float()


def scene(seed, size=(24, 30), box=(13, 11), channels=5):
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.standard_normal((3, *size))).float()
    target = one_hot(rng.integers(0, channels + 1, size), channels)
    instance = torch.from_numpy(rng.standard_normal((3, *box))).float()
    mask = torch.from_numpy(rng.random(box) < rng.choice([0.03, 0.5, 1.0]))
    return image, target, instance, mask


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    box=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    lam=st.sampled_from([0.0, 0.25, 0.9, 1.0]),
    enlarge=st.booleans(),
    data=st.data(),
)
def test_golden_values(seed, size, box, lam, enlarge, data):
    image, target, instance, mask = scene(seed, size, box)
    cell = data.draw(st.integers(1, min(size)))
    origin = data.draw(st.tuples(st.integers(0, size[0] - 1), st.integers(0, size[1] - 1)))
    found = paste_instance(image, target, instance, mask, 2, origin, cell, lam, enlarge=enlarge)
    arrays = [tensor.numpy() for tensor in (image, target, instance, mask)]
    wanted = reference.paste(*arrays, 2, origin, cell, lam, enlarge)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.numpy(), b, atol=1e-6)


def test_resizing_reads_the_pixels_that_torch_reads():
    for cell in (7, 31, 125, 250):
        for tall in (2, 3, 5, 6, 30, 31, 62, 124, 250, 400):
            for wide in (2, tall):
                scale = min(cell / (tall + 1), cell / (wide + 1))
                if int(wide * scale) == 0:
                    continue
                column = torch.arange(tall).float()[:, None].expand(tall, wide)
                resized = torch.nn.functional.interpolate(column[None, None], scale_factor=scale, mode="nearest")
                assert reference.nearest(tall, scale) == resized[0, 0, :, 0].tolist()
                assert len(reference.nearest(wide, scale)) == resized.shape[-1]


def test_opacity_zero_changes_nothing():
    image, target, instance, mask = scene(1)
    found = paste_instance(image, target, instance, mask, 2, (0, 0), 12, 0.0)
    assert torch.equal(found[0], image)
    assert torch.equal(found[1], target)


def test_opacity_one_replaces_pixels_and_target():
    image, target, instance, mask = scene(2)
    mask[:] = True
    mask[0, 0] = False
    new, soft = paste_instance(image, target, instance, mask, 2, (12, 12), 12, 1.0)
    scale = min(12 / 12, 12 / 14)
    crop = torch.nn.functional.interpolate(instance[None], scale_factor=scale, mode="nearest")[0]
    where = torch.nn.functional.interpolate(mask[None, None].float(), scale_factor=scale, mode="nearest")[0, 0] > 0
    height, width = where.shape
    assert torch.equal(new[:, 12 : 12 + height, 12 : 12 + width][:, where], crop[:, where])
    rows = soft[:, 12 : 12 + height, 12 : 12 + width][:, where]
    assert torch.equal(rows, one_hot(np.full(int(where.sum()), 2)[None], 5)[:, 0])


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_rows_of_the_target_still_sum_to_one(lam):
    image, target, instance, mask = scene(3)
    valid = target.sum(0) > 0
    _, soft = paste_instance(image, target, instance, mask, 2, (0, 0), 24, lam)
    torch.testing.assert_close(soft.sum(0)[valid], torch.ones(int(valid.sum())), atol=1e-6, rtol=0)
    assert soft.min() >= 0


def test_an_ignored_pixel_starts_to_count_for_the_class_only():
    image, target, instance, mask = scene(4)
    target[:] = 0
    mask[:] = True
    _, soft = paste_instance(image, target, instance, mask, 2, (0, 0), 24, 0.25)
    assert set(soft[2].unique().tolist()) == {0.0, 0.25}
    assert torch.equal(soft.sum(0), soft[2])


def test_pixels_off_the_mask_keep_their_bits():
    image, target, instance, mask = scene(5)
    instance[:, ~mask] = float("nan")
    image[:, 0, 0] = -0.0
    mask[0, 0], mask[0, 1] = False, True
    new, soft = paste_instance(image, target, instance, mask, 2, (0, 0), 12, 0.5)
    touched = (new != image).any(0)
    assert 0 < touched.sum() <= 11 * 11
    assert torch.equal(new[:, ~touched].view(torch.int32), image[:, ~touched].view(torch.int32))
    assert torch.equal(soft[:, ~touched], target[:, ~touched])
    assert not touched[12:].any()
    assert not touched[:, 12:].any()


def test_the_four_cells_give_the_same_paste_at_another_place():
    _, _, instance, mask = scene(6)
    image, target = torch.zeros(3, 64, 64), torch.zeros(5, 64, 64)
    target[0] = 1
    cells = [origin for origin, _ in rank_cells(torch.zeros(64, 64, dtype=torch.bool), cell_side(64))]
    assert cells == [(0, 0), (0, 31), (31, 0), (31, 31)]
    found = [paste_instance(image, target, instance, mask, 2, origin, 31, 0.5) for origin in cells]
    for (i, j), (new, soft) in zip(cells, found, strict=True):
        assert torch.equal(new, found[0][0].roll((i, j), (1, 2)))
        assert torch.equal(soft, found[0][1].roll((i, j), (1, 2)))


def extent(image):
    """Rows and columns that were touched on a canvas of zeros."""
    rows, columns = image[0].any(1).nonzero().flatten(), image[0].any(0).nonzero().flatten()
    return len(rows), len(columns), int(rows[0]), int(columns[0])


@pytest.mark.parametrize("origin", [(0, 0), (250, 250)])
def test_every_bounding_box_fits_its_cell(origin):
    canvas, target = torch.zeros(1, 512, 512), torch.zeros(2, 1, 1).expand(2, 512, 512)
    for size in [*range(2, 12), *range(12, 512, 37), 249, 250, 251, 511, 512]:
        for height, width in ((size, size), (2, size), (size, max(2, size // 3))):
            instance, mask = torch.ones(1, height, width), torch.ones(height, width, dtype=torch.bool)
            new, _ = paste_instance(canvas, target, instance, mask, 1, origin, 250, 1.0)
            if not new.any():
                assert height * 250 // (size + 1) == 0  # so long that its short side shrinks to nothing
                continue
            tall, wide, top, left = extent(new)
            assert max(tall, wide) <= 249
            assert (top, left) == origin
            assert new.sum() == tall * wide


def test_two_by_two_pixels_fill_two_thirds_of_the_cell_unless_they_keep_their_size():
    canvas, target = torch.zeros(3, 512, 512), torch.zeros(2, 512, 512)
    instance, mask = torch.ones(3, 8, 8), torch.zeros(8, 8, dtype=torch.bool)
    mask[3:5, 3:5] = True
    new, _ = paste_instance(canvas, target, instance, mask, 1, (0, 0), 250, 1.0)
    assert extent(new) == (166, 166, 0, 0)
    new, _ = paste_instance(canvas, target, instance, mask, 1, (0, 0), 250, 1.0, enlarge=False)
    assert extent(new) == (2, 2, 0, 0)
    large = torch.ones(400, 400, dtype=torch.bool)
    both = [
        paste_instance(canvas, target, torch.ones(3, 400, 400), large, 1, (0, 0), 250, 1.0, on) for on in (True, False)
    ]
    assert torch.equal(both[0][0], both[1][0])
    assert extent(both[0][0])[:2] == (249, 249)


def test_what_would_stick_out_is_moved_inside():
    canvas, target = torch.zeros(3, 512, 512), torch.zeros(2, 512, 512)
    whole = torch.ones(400, 400, dtype=torch.bool)
    new, _ = paste_instance(canvas, target, torch.ones(3, 400, 400), whole, 1, (300, 262), 250, 1.0)
    assert extent(new) == (249, 249, 512 - 1 - 249, 262)


@pytest.mark.parametrize("pixels", [[], [(2, 2)], [(2, 1), (2, 5)], [(1, 3), (4, 3)]])
def test_masks_of_one_pixel_width_are_not_pasted(pixels):
    image, target, instance, mask = scene(7)
    mask[:] = False
    for place in pixels:
        mask[place] = True
    new, soft = paste_instance(image, target, instance, mask, 2, (0, 0), 12, 0.5)
    assert torch.equal(new, image)
    assert torch.equal(soft, target)
    assert new is not image
    assert new.data_ptr() != image.data_ptr()
    assert soft.data_ptr() != target.data_ptr()


def test_the_arguments_are_not_changed():
    arguments = scene(8)
    before = [tensor.clone() for tensor in arguments]
    new, _ = paste_instance(*arguments, 2, (3, 4), 12, 0.5)
    assert not torch.equal(new, before[0])
    for tensor, copy in zip(arguments, before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize(("origin", "cell"), [((0, 0), 25), ((0, 0), 0), ((24, 0), 12), ((0, -1), 12)])
def test_a_cell_outside_of_the_picture_is_refused(origin, cell):
    with pytest.raises(ValueError, match="expected a cell inside the picture of 24 x 30"):
        paste_instance(*scene(9), 2, origin, cell, 0.5)


# ---------------------------------------------------------------- cells


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    cell=st.integers(1, 45),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_cells_are_ranked_by_their_background(seed, size, cell, share):
    masks = np.random.default_rng(seed).random((3, *size)) < share
    origins, counts = rank_cells_batch(torch.from_numpy(masks), cell)
    for mask, places, background in zip(masks, origins.tolist(), counts.tolist(), strict=True):
        wanted = reference.rank(mask, cell)
        assert rank_cells(torch.from_numpy(mask), cell) == wanted
        assert [(tuple(place), count) for place, count in zip(places, background, strict=True)] == wanted


def test_published_pictures_have_four_cells_and_ties_stay_in_row_major_order():
    mask = torch.zeros(512, 512, dtype=torch.bool)
    mask[:250, 250:500] = True
    mask[400, 400] = True
    mask[510:, 510:] = True  # beyond the last cell
    assert rank_cells(mask, cell_side(512)) == [((0, 0), 62500), ((250, 0), 62500), ((250, 250), 62499), ((0, 250), 0)]


def test_sides_of_cells():
    assert [cell_side(height) for height in (512, 256, 64, 513)] == [250, 125, 31, 250]


def test_cells_larger_than_the_picture_and_cells_without_pixels():
    assert rank_cells(torch.zeros(8, 8, dtype=torch.bool), 9) == []
    assert rank_cells(torch.zeros(8, 20, dtype=torch.bool), 9) == []
    with pytest.raises(ValueError, match="cell=0; expected a side of at least 1"):
        rank_cells(torch.zeros(8, 8, dtype=torch.bool), 0)
