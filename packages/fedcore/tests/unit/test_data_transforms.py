"""Crops and flips against a loop over single pictures; normalisation against its formula and torchvision."""

import numpy as np
import pytest
import torch
from fedcore.data.arrays import ArrayData
from fedcore.data.transforms import CropFlip, Normalise, Trim
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.integers(0, 99)
)
def test_crop_and_flip_are_those_of_single_pictures(count, channels, height, width, padding, seed):
    images = torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)
    found = CropFlip(padding)(images, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator).squeeze(-1)
    flips = torch.rand((count, 1), generator=generator) < 0.5
    for i in range(count):
        big = np.zeros((channels, height + 2 * padding, width + 2 * padding), np.uint8)
        big[:, padding : padding + height, padding : padding + width] = images[i].numpy()
        top, left = int(places[0, i]), int(places[1, i])
        crop = big[:, top : top + height, left : left + width]
        np.testing.assert_array_equal(found[i].numpy(), crop[:, :, ::-1] if flips[i] else crop)
    assert found.dtype == torch.uint8


def test_all_places_and_both_flips_occur_about_equally():
    image = torch.arange(1, 17, dtype=torch.uint8).reshape(1, 1, 4, 4).expand(6000, 1, 4, 4)
    found = CropFlip(1)(image, torch.Generator().manual_seed(0)).flatten(1)
    _, counts = torch.unique(found, dim=0, return_counts=True)
    assert len(counts) == 18  # 3 rows x 3 columns x 2
    assert counts.min() > 333 * 0.75
    assert counts.max() < 333 * 1.25


def test_no_padding_and_no_flip_change_nothing():
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(CropFlip(0, flip=0.0)(images, torch.Generator()), images)
    assert torch.equal(CropFlip(0, flip=1.0)(images, torch.Generator()), images.flip(3))


def test_normalise_is_the_formula():
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    found = Normalise(mean, std)(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (500, 333), (300, 512)])
def test_resize_and_central_crop_are_torchvisions(shape):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = Normalise((0.0,) * 3, (1.0,) * 3, size=224)(images) * 255
    big = functional.resize(images.float(), [256], antialias=True)
    torch.testing.assert_close(found, functional.center_crop(big, [224, 224]), rtol=1e-4, atol=1e-2)


def test_a_grey_picture_becomes_three_channels_where_three_are_normalised():
    images = torch.full((2, 1, 8, 8), 51, dtype=torch.uint8)
    made = Normalise((0.1, 0.2, 0.3), (1.0, 1.0, 1.0), size=16)
    data = ArrayData(images, torch.zeros(2), transform=made)
    assert data.input_shape == (3, 16, 16) == tuple(data.batch(torch.tensor([0]))[0].shape[1:])
    torch.testing.assert_close(made(images)[0, :, 0, 0], torch.tensor([0.1, 0.0, -0.1]), atol=1e-6, rtol=0)


def test_trim_keeps_the_longest_text_of_the_batch():
    ids = torch.tensor([[3, 1, 0, 0, 0], [2, 0, 4, 0, 0]], dtype=torch.int32)
    assert Trim()(ids).tolist() == [[3, 1, 0], [2, 0, 4]]
    assert Trim()(torch.zeros(2, 4, dtype=torch.int32)).shape == (2, 1)
