"""Pictures and index masks as files."""

import struct
import zlib

import numpy as np
import pytest
from css.data.base import Item
from css.data.files import check_sizes, mask_ids, palette, read_image, read_mask, write_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from polymodal.errors import UserError


def png(path, rows, depth, kind=0, extra=b""):
    """A PNG written byte by byte: the library writes no grey files of 2 or 4 bits."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    width = len(rows[0]) * 8 // depth
    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )
    return path


@pytest.fixture
def label():
    mask = np.random.default_rng(0).integers(0, 21, (30, 40)).astype(np.uint8)
    mask[:3] = 255
    return mask


# --- masks ----------------------------------------------------------------------------------------------------------


def test_palette_mask_is_read_as_indices(tmp_path, label):
    picture = Image.fromarray(label)
    picture.putpalette(list(range(256)) * 3)
    picture.save(tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as stored:
        assert stored.mode == "P"
        assert not np.array_equal(np.array(stored.convert("L")), label)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", 20), label)


def test_grey_mask_is_read_as_values(tmp_path, label):
    Image.fromarray(label).save(tmp_path / "m.png")
    found = read_mask(tmp_path / "m.png", 20)
    np.testing.assert_array_equal(found, label)
    assert found.dtype == np.uint8


@pytest.mark.parametrize(
    ("depth", "rows", "ids"),
    [
        (1, [[0b10100000]], [1, 0, 1, 0, 0, 0, 0, 0]),
        (2, [[0b00011011]], [0, 1, 2, 3]),
        (4, [[0x12, 0x3F]], [1, 2, 3, 15]),
        (8, [[7, 255]], [7, 255]),
        (16, [[0, 9, 0, 255]], [9, 255]),
    ],
)
def test_grey_masks_of_every_depth_keep_their_ids(tmp_path, depth, rows, ids):
    np.testing.assert_array_equal(read_mask(png(tmp_path / "m.png", rows, depth)), [ids])


@pytest.mark.parametrize(("depth", "row", "ids"), [(2, [0b00011011], [0, 1, 2, 3]), (4, [0x12, 0x3F], [1, 2, 3, 15])])
def test_palette_masks_of_few_bits_keep_their_ids(tmp_path, depth, row, ids):
    colors = b"".join(bytes([200 - number] * 3) for number in range(16))
    chunk = struct.pack(">I", 48) + b"PLTE" + colors + struct.pack(">I", zlib.crc32(b"PLTE" + colors))
    np.testing.assert_array_equal(read_mask(png(tmp_path / "m.png", [row], depth, kind=3, extra=chunk)), [ids])


def test_an_unknown_id_names_file_id_and_count(tmp_path, label):
    label[5, :7] = 21
    Image.fromarray(label).save(tmp_path / "bad.png")
    with pytest.raises(UserError, match=r"bad\.png: unknown id 21 in 7 pixels; expected 0 .*1\.\.20 or 255") as caught:
        read_mask(tmp_path / "bad.png", 20)
    assert "\n" not in str(caught.value)
    assert read_mask(tmp_path / "bad.png", 21).max() == 255


def test_ids_above_eight_bits_are_unknown(tmp_path):
    with pytest.raises(UserError, match="unknown id 256 in 1 pixels"):
        read_mask(png(tmp_path / "m.png", [[1, 0, 0, 3]], 16))


def test_many_unknown_ids_are_not_all_listed(tmp_path):
    Image.fromarray(np.arange(100, dtype=np.uint8)[None]).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=r"unknown id 11, 12, 13, 14, 15, \.\.\. in 89 pixels"):
        read_mask(tmp_path / "m.png", 10)


def test_colour_and_lossy_masks_are_refused(tmp_path, label):
    Image.fromarray(label).convert("RGB").save(tmp_path / "c.png")
    with pytest.raises(UserError, match=r"c\.png: colour picture \(mode RGB\)"):
        read_mask(tmp_path / "c.png", 20)
    Image.fromarray(label).save(tmp_path / "l.jpg")
    with pytest.raises(UserError, match=r"l\.jpg: JPEG is lossy"):
        read_mask(tmp_path / "l.jpg", 20)


def broken(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    elif how == "flipped":
        place = data.index(b"IDAT") + 30
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])


@pytest.mark.parametrize("how", ["cut", "empty", "text", "flipped"])
def test_a_broken_mask_or_picture_is_one_line_with_its_name(tmp_path, label, how):
    for read, name in ((read_mask, "mask"), (read_image, "image")):
        path = tmp_path / f"{name}.png"
        Image.fromarray(label).save(path)
        broken(path, how)
        with pytest.raises(UserError, match=rf"^{name} .*{name}\.png cannot be read \(.+\); copy it again") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"mask .*gone\.png is missing"):
        read_mask(tmp_path / "gone.png", 3)
    with pytest.raises(UserError, match=r"image .*gone\.jpg is missing"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match=r"image .* cannot be read"):
        read_image(tmp_path)


@settings(max_examples=40, deadline=None)
@given(mask=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 255)))
def test_ids_are_those_of_a_set(mask):
    assert mask_ids(mask) == tuple(sorted(set(mask.ravel().tolist()) - {0, 255}))


# --- writing --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    mask=hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 255)),
    colors=st.sampled_from([None, 3, 16, 256]),
)
def test_what_is_written_is_read(tmp_path_factory, mask, colors):
    path = tmp_path_factory.getbasetemp() / "written.png"
    write_mask(path, mask, None if colors is None else palette(colors))
    np.testing.assert_array_equal(read_mask(path), mask)
    with Image.open(path) as stored:
        assert stored.mode == "P"


def test_written_masks_carry_the_palette(tmp_path, label):
    write_mask(tmp_path / "m.png", label)
    np.testing.assert_array_equal(read_image(tmp_path / "m.png"), palette()[label])
    own = np.random.default_rng(1).integers(0, 256, (256, 3)).astype(np.uint8)
    write_mask(tmp_path / "m.png", label, own)
    np.testing.assert_array_equal(read_image(tmp_path / "m.png"), own[label])
    write_mask(tmp_path / "m.png", label, own[:4])
    np.testing.assert_array_equal(read_image(tmp_path / "m.png"), np.vstack([own[:4], palette()[4:]])[label])


def test_what_is_no_mask_is_not_written(tmp_path):
    for array in (np.zeros((2, 2, 3), np.uint8), np.array([[256]]), np.array([[-1]])):
        with pytest.raises(ValueError, match="expected \\(H, W\\) with ids"):
            write_mask(tmp_path / "m.png", array)
    assert not list(tmp_path.iterdir())


def test_the_palette_is_that_of_voc():
    # first entries of the map in the VOC development kit, and the colour of its borders
    expected = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)]
    assert [tuple(row) for row in palette(7).tolist()] == expected
    assert palette()[15].tolist() == [192, 128, 128]
    assert palette()[20].tolist() == [0, 64, 128]
    assert palette()[255].tolist() == [224, 224, 192]
    assert len({tuple(row) for row in palette().tolist()}) == 256


# --- pictures -------------------------------------------------------------------------------------------------------


def test_pictures_of_every_kind_become_rgb(tmp_path):
    rgb = np.random.default_rng(2).integers(0, 256, (6, 5, 3)).astype(np.uint8)
    grey = rgb[:, :, 0]
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([rgb, grey])).save(tmp_path / "rgba.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    paletted = Image.fromarray(rgb).quantize(8)
    paletted.info["transparency"] = bytes([0, 100, 200])
    paletted.save(tmp_path / "p.png", transparency=bytes([0, 100, 200]))
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.png"), rgb)
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), rgb)
    for name in ("grey", "deep"):
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}.png"), np.repeat(grey[:, :, None], 3, 2))
    found = read_image(tmp_path / "p.png")
    assert (found.shape, found.dtype) == ((6, 5, 3), np.uint8)


def test_pixels_are_those_stored_whatever_the_camera_said(tmp_path):
    rgb = np.random.default_rng(3).integers(0, 256, (4, 7, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), rgb)


def test_sizes_are_compared(tmp_path):
    item = Item("a", tmp_path / "a.jpg", tmp_path / "a.png")
    check_sizes(item, np.zeros((4, 6, 3)), np.zeros((4, 6)))
    with pytest.raises(UserError, match=r"a: image .*a\.jpg is 6 x 4 pixels, mask .*a\.png 6 x 5; export one"):
        check_sizes(item, np.zeros((4, 6, 3)), np.zeros((5, 6)))
    with pytest.raises(UserError, match="6 x 4 pixels, .* 4 x 6; apply the rotation of the image's EXIF"):
        check_sizes(item, np.zeros((4, 6, 3)), np.zeros((6, 4)))
