"""Augmentation and evaluation crop: torchvision's rule, the same for a picture and its maps."""

import math

import numpy as np
import pytest
import torch
from css.data.transforms import MEAN, STD, Draw, augment, draw_augmentation, draw_crop, fit, normalise, to_tensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def blocks(height, width, seed=0, side=16):
    """A picture of one-coloured blocks whose red is ten times the label."""
    rng = np.random.default_rng(seed)
    label = np.kron(rng.integers(0, 20, (-(-height // side), -(-width // side))), np.ones((side, side)))
    label = label[:height, :width].astype(np.uint8)
    return np.stack([label * 10, label * 5, 255 - label], 2), label


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.integers(0, 2**31),
    st.sampled_from([((0.5, 2.0), (3 / 4, 4 / 3)), ((0.1, 0.4), (0.5, 2.0)), ((1.2, 2.0), (0.9, 1.1))]),
)
def test_boxes_are_those_of_torchvision(height, width, seed, options):
    scale, ratio = options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        crop = v2.RandomResizedCrop(8, scale=scale, ratio=ratio)
        found = crop.make_params([tv_tensors.Mask(torch.zeros(height, width, dtype=torch.uint8))])
    box = draw_crop(height, width, scale, ratio, torch.Generator().manual_seed(seed))
    assert box == (found["top"], found["left"], found["height"], found["width"])


def test_areas_above_the_picture_fall_back_to_the_largest_central_crop():
    for height, width, expected in [
        (300, 300, (0, 0, 300, 300)),
        (300, 390, (0, 0, 300, 390)),
        (300, 900, (0, 250, 300, 400)),
        (900, 300, (250, 0, 400, 300)),
    ]:
        box = draw_crop(height, width, (1.5, 2.0), (3 / 4, 4 / 3), torch.Generator().manual_seed(0))
        assert box == expected


def test_share_of_the_picture_and_of_flips():
    draws = [draw_augmentation(375, 500, torch.Generator().manual_seed(i)) for i in range(400)]
    whole = np.mean([draw.box == (0, 0, 375, 500) for draw in draws])
    areas = np.array([draw.box[2] * draw.box[3] for draw in draws]) / (375 * 500)
    assert whole < 0.2
    assert 0.5 <= areas.min() < 0.55
    assert 0.42 < np.mean([draw.flip for draw in draws]) < 0.58
    generator = torch.Generator
    assert not any(draw_augmentation(9, 9, generator().manual_seed(i), flip=0.0).flip for i in range(50))
    assert all(draw_augmentation(9, 9, generator().manual_seed(i), flip=1.0).flip for i in range(50))


@settings(max_examples=25, deadline=None)
@given(st.integers(40, 130), st.integers(40, 130), st.integers(0, 10_000), st.sampled_from([33, 64, 96]))
@example(104, 101, 1, 33)
def test_picture_and_label_get_the_same_draw(height, width, seed, size):
    image, label = blocks(height, width, seed)
    draw = draw_augmentation(height, width, torch.Generator().manual_seed(seed), scale=(0.3, 1.0))
    pixels, maps = augment(*to_tensors(image, [label, label > 9]), draw, size)
    assert pixels.shape == (3, size, size)
    assert maps.shape == (2, size, size)
    assert pixels.dtype == maps.dtype == torch.uint8
    assert type(pixels) is type(maps) is torch.Tensor
    torch.testing.assert_close(maps[1].bool(), maps[0] > 9)
    zoom = size / min(draw.box[2:])  # enlarged, a pixel of the source colours half its size beyond its edge
    away = inner(maps[0], reach=max(2, math.ceil(zoom / 2) + 1))
    assert away.any()
    torch.testing.assert_close(pixels[0][away], maps[0][away] * 10, atol=1, rtol=0)
    torch.testing.assert_close(pixels[1][away], maps[0][away] * 5, atol=1, rtol=0)


def inner(label, reach=2):
    """Where all pixels within ``reach`` have one label, off the rim; interpolation mixes equal colours only there."""
    values = label.float()[None, None]
    pool = torch.nn.functional.max_pool2d
    high, low = pool(values, 2 * reach + 1, 1, reach), -pool(-values, 2 * reach + 1, 1, reach)
    found = (high == low)[0, 0]
    # A last column of pixels may be skipped by the nearest ones alone; reduced, it colours the next place but one too.
    found[[0, 1, -2, -1]] = found[:, [0, 1, -2, -1]] = False
    return found


def test_a_whole_box_without_flip_changes_nothing_and_a_flip_mirrors():
    image, label = blocks(48, 48)
    same = augment(*to_tensors(image, [label]), Draw((0, 0, 48, 48)), 48)
    np.testing.assert_array_equal(same[0].permute(1, 2, 0).numpy(), image)
    np.testing.assert_array_equal(same[1][0].numpy(), label)
    mirrored = augment(*to_tensors(image, [label]), Draw((0, 0, 48, 48), flip=True), 48)
    np.testing.assert_array_equal(mirrored[0].permute(1, 2, 0).numpy(), image[:, ::-1])
    np.testing.assert_array_equal(mirrored[1][0].numpy(), label[:, ::-1])


def test_labels_are_taken_and_never_mixed():
    image, label = blocks(61, 47)
    label[::3] = 255
    values = set(np.unique(label).tolist())
    for seed in range(10):
        draw = draw_augmentation(61, 47, torch.Generator().manual_seed(seed))
        _, maps = augment(*to_tensors(image, [label]), draw, 80)
        assert set(maps.unique().tolist()) <= values
    assert set(fit(*to_tensors(image, [label]), 80)[1].unique().tolist()) <= values


def bilinear(plane, height, width):
    """Resampling to a larger size with half-pixel centres, in float64."""
    out = plane.astype(np.float64)
    for axis, size in enumerate((height, width)):
        old = plane.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, old - 1)
        share = (place - low).reshape([-1, 1] if axis == 0 else [1, -1])
        out = np.take(out, low, axis) * (1 - share) + np.take(out, high, axis) * share
    return out


@pytest.mark.parametrize(("height", "width"), [(30, 50), (50, 30), (41, 41)])
def test_evaluation_crop_is_the_centre_at_the_shorter_side(height, width):
    image, label = blocks(height, width, side=5)
    size = 60
    high, wide = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    top, left = round((high - size) / 2), round((wide - size) / 2)
    pixels, maps = fit(*to_tensors(image, [label]), size)
    assert pixels.shape == (3, size, size)
    for channel in range(3):
        expected = bilinear(image[..., channel], high, wide)[top : top + size, left : left + size]
        assert np.abs(pixels[channel].numpy() - expected).max() <= 1
    rows, columns = (np.floor(np.arange(new) * old / new).astype(int) for new, old in ((high, height), (wide, width)))
    expected = label[rows][:, columns][top : top + size, left : left + size]
    np.testing.assert_array_equal(maps[0].numpy(), expected)


def test_normalising_matches_the_definition_and_leaves_bytes_alone():
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    pixels, _ = to_tensors(image, [image[..., 0]])
    before = pixels.clone()
    found = normalise(pixels)
    expected = (image.astype(np.float64) / 255 - np.array(MEAN)) / np.array(STD)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert torch.equal(pixels, before)


def test_arrays_that_cannot_be_written_to_are_taken_too():
    image, label = blocks(20, 20)
    image.flags.writeable = label.flags.writeable = False
    pixels, maps = to_tensors(image[:, ::-1], [label[::-1]])
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), image[:, ::-1])
    np.testing.assert_array_equal(maps[0].numpy(), label[::-1])
