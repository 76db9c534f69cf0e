"""Decoding frame folders, and the geometric transforms."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from polymodal.errors import UserError
from polymodal.seeding import generator
from slt.data.frames import count_frames, frame_names, load_frames, load_image
from slt.data.transforms import ClipTransform, Draw, draw_augmentation

NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    for number in (1, 2, 10, 11):
        Image.new("RGB", (6, 4), (number, 0, 0)).save(tmp_path / f"f{number}.png")
    (tmp_path / "Thumbs.db").write_text("")
    (tmp_path / "._f1.png").write_text("")
    return tmp_path


def test_names_are_in_natural_order_and_only_pictures(folder):
    assert frame_names(folder) == ["f1.png", "f2.png", "f10.png", "f11.png"]
    assert count_frames(folder) == 4
    assert frame_names(folder / "no") == []
    assert count_frames(folder / "no") == count_frames(folder / "f1.png") == 0


def test_frames_by_index(folder):
    assert load_frames(folder, [0, 2, 3])[:, 0, 0, 0].tolist() == [1, 10, 11]


@pytest.mark.parametrize("index", [4, -1])
def test_an_index_outside_the_clip(folder, index):
    with pytest.raises(UserError, match=f"has 4 frames, number {index} was asked for"):
        load_frames(folder, [0, index])
    with pytest.raises(UserError, match="no frame was asked for"):
        load_frames(folder, [])


def test_frames_of_different_size(folder):
    Image.new("RGB", (7, 4)).save(folder / "f3.png")
    with pytest.raises(UserError, match=r"f3\.png is 7x4, the clip's first frame is 6x4"):
        load_frames(folder, [0, 2])


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [("L", 7, (7, 7, 7)), ("P", 1, (9, 8, 7)), ("RGBA", (1, 2, 3, 128), (1, 2, 3)), ("1", 1, (255, 255, 255))],
)
def test_picture_modes(tmp_path, mode, color, expected):
    image = Image.new(mode, (3, 2), color)
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 8, 7])
    image.save(tmp_path / "a.png")
    pixels = load_image(tmp_path / "a.png")
    assert pixels.shape == (2, 3, 3)
    assert tuple(pixels[1, 2]) == expected


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_truncated_picture_is_never_half_a_picture(tmp_path, kind):
    """Cut anywhere: an error that names the file, or (where only the file's end marker is gone) every pixel."""
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, kind)
    data, path = buffer.getvalue(), tmp_path / f"a.{kind}"
    whole = np.asarray(Image.open(buffer).convert("RGB"))
    errors = []
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        try:
            np.testing.assert_array_equal(load_image(path), whole)
        except UserError as error:
            errors.append(str(error))
    assert len(errors) > 0.9 * len(range(0, len(data), 7))
    assert all(str(path) in text and "copy or extract it again" in text and "\n" not in text for text in errors)


def test_other_broken_pictures(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"text\.png \(10 bytes\) cannot be decoded"):
        load_image(tmp_path / "text.png")
    with pytest.raises(UserError, match=r"none\.png is missing"):
        load_image(tmp_path / "none.png")


def ramp(frames=3, height=32, width=40):
    """Frames whose pixels tell their column, row and frame."""
    clip = np.zeros((frames, height, width, 3), dtype=np.uint8)
    clip[..., 0] = np.arange(width)[None, None]
    clip[..., 1] = np.arange(height)[None, :, None]
    clip[..., 2] = np.arange(frames)[:, None, None]
    return clip


def test_no_resize_leaves_every_pixel():
    clip = ramp(height=24, width=24)
    out = ClipTransform(24)(clip)
    assert out.dtype == torch.uint8
    np.testing.assert_array_equal(out.permute(0, 2, 3, 1).numpy(), clip)


def test_evaluation_takes_the_centre():
    clip = ramp(height=32, width=32)
    out = ClipTransform(24, 32)(clip)
    assert out.shape == (3, 3, 24, 24)
    np.testing.assert_array_equal(out.permute(0, 2, 3, 1).numpy(), clip[:, 4:28, 4:28])


@pytest.mark.parametrize(("share", "start"), [(0.0, 0), (0.49, 4), (0.999999, 8)])
def test_the_crop_reaches_both_edges(share, start):
    clip = ramp(height=32, width=32)
    out = ClipTransform(24, 32)(clip, Draw(crop=(share, 1 - share)))
    assert int(out[0, 1, 0, 0]) == start
    assert int(out[0, 0, 0, 0]) == (8 if share == 0 else 8 - start)


def test_shift_moves_pixels_without_a_flip():
    clip = ramp(height=24, width=24)
    out = ClipTransform(24)(clip, Draw(shift=(3, -2)))
    assert int(out[0, 0, 10, 10]) == 7
    assert int(out[0, 1, 10, 10]) == 12
    assert int(out[0, 0, 10, 2]) == 0


def test_rotation_turns_counter_clockwise():
    clip = np.zeros((1, 25, 25, 3), dtype=np.uint8)
    clip[0, 12, 20] = 255  # to the right of the centre
    out = ClipTransform(25)(clip, Draw(angle=90.0))
    assert int(out[0, 0, 4, 12]) == 255, "what was on the right is on top"


@pytest.mark.parametrize("seed", range(8))
def test_all_frames_of_a_clip_get_the_same_draw(seed):
    still = np.repeat(np.random.default_rng(seed).integers(0, 256, (1, 40, 48, 3), dtype=np.uint8), 4, axis=0)
    out = ClipTransform(24, 28)(still, draw_augmentation(generator(seed, "x")))
    assert out.shape == (4, 3, 24, 24)
    assert all(torch.equal(out[0], frame) for frame in out)


def test_draws_cover_the_ranges_and_half_of_them_do_nothing():
    draws = [draw_augmentation(generator(seed, "augment")) for seed in range(2000)]
    for values, neutral, low, high in [
        ([d.angle for d in draws], 0.0, -30, 30),
        ([d.scale for d in draws], 1.0, 0.8, 1.2),
        ([d.shift[0] for d in draws], 0, -10, 10),
    ]:
        array = np.array(values)
        assert low <= array.min() < low + 0.02 * (high - low)
        assert high >= array.max() > high - 0.02 * (high - low)
        assert (array == neutral).mean() == pytest.approx(0.5, abs=0.06)
        assert array[array != neutral].mean() == pytest.approx(neutral, abs=0.05 * (high - low))
    crops = np.array([d.crop for d in draws])
    assert crops.mean(0) == pytest.approx([0.5, 0.5], abs=0.03)
    assert abs(np.corrcoef(crops.T)[0, 1]) < 0.07


def test_the_same_generator_draws_the_same():
    assert draw_augmentation(generator(1, "a")) == draw_augmentation(generator(1, "a"))
    assert draw_augmentation(generator(1, "a")) != draw_augmentation(generator(1, "b"))


def test_odd_sizes_survive_the_whole_augmentation():
    transform = ClipTransform(24, 30)
    for seed in range(20):
        out = transform(ramp(2, 21, 26), draw_augmentation(generator(seed, "odd")))
        assert out.shape == (2, 3, 24, 24)
        assert out.dtype == torch.uint8
