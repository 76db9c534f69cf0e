"""Images, sounds, numbers and texts as towers get them, against an independent reading."""

from __future__ import annotations

import importlib.util
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from missing_modal.data import arrays
from missing_modal.data.images import CLIP_MEAN, CLIP_STD, image_tensor, read_image, resize_crop
from missing_modal.data.tokenize import tokenizer
from PIL import Image
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("mm_layouts_inputs", Path(__file__).parents[1] / "_layouts.py")
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)


# ------------------------------------------------------------------ images


@pytest.mark.parametrize("size", [(300, 200), (201, 333), (64, 64), (50, 1000), (200, 333), (333, 200)])
def test_images_equal_clips_own_transform(size):
    """torchvision's Resize(224, bicubic), CenterCrop(224), ToTensor, Normalize: how CLIP prepares images."""
    from torchvision import transforms as T

    image = layouts.picture(1, size=size)
    clip = T.Compose(
        [
            T.Resize(224, interpolation=T.InterpolationMode.BICUBIC),
            T.CenterCrop(224),
            T.ToTensor(),
            T.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    ours = image_tensor(image)
    assert ours.shape == (3, 224, 224)
    torch.testing.assert_close(ours, clip(image), atol=1e-6, rtol=0)


def test_sources_of_one_image_are_one_tensor(tmp_path):
    data = layouts.encoded(3, "PNG")
    path = layouts.put(tmp_path / "a.png", data)
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    first = image_tensor(path, 32)
    for source in (str(path), data, pixels):
        assert torch.equal(first, image_tensor(source, 32))
    given = np.ones((4, 2, 2), np.float64)
    assert torch.equal(image_tensor(given), torch.ones(4, 2, 2))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_modes_become_three_channels(mode):
    stream = io.BytesIO()
    layouts.picture(0).convert(mode).save(stream, format="TIFF" if mode == "CMYK" else "PNG")
    assert resize_crop(read_image(stream.getvalue()), 16).shape == (16, 16, 3)


def test_sixteen_bit_grey_is_scaled():
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)).save(stream, format="PNG")
    assert np.asarray(read_image(stream.getvalue())).tolist() == [[[0x80] * 3] * 4] * 4


@pytest.mark.parametrize("cut", [0, 20, 400])
def test_broken_images_are_named(tmp_path, cut):
    path = layouts.put(tmp_path / "bad.jpg", layouts.encoded(0)[:cut])
    with pytest.raises(UserError, match=r"bad\.jpg is broken"):
        read_image(path)
    with pytest.raises(UserError, match=r"gone\.jpg cannot be read"):
        read_image(tmp_path / "gone.jpg")


def test_arrow_cells_are_small_and_travel_to_workers(tmp_path):
    pytest.importorskip("pyarrow")
    from missing_modal.data.arrow import ArrowCell

    data = layouts.encoded(5)
    cell = ArrowCell(layouts.write_arrow(tmp_path / "a.arrow", {"image": [b"x", data]}), 1)
    copy = pickle.loads(pickle.dumps(cell))
    assert copy.read() == data
    assert len(pickle.dumps(cell)) < 400
    with pytest.raises(UserError, match=r"a\.arrow, row 0 is broken"):
        read_image(ArrowCell(cell.path, 0))


# ------------------------------------------------------------------ sounds and numbers


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_of_any_depth(tmp_path, width):
    left = np.sin(np.arange(200) / 9) * 0.8
    path = layouts.write_wav(tmp_path / "a.wav", np.stack([left, left / 2], 1), 8000, width, channels=2)
    samples, rate = arrays.read_wav(path)
    assert (rate, samples.shape, samples.dtype) == (8000, (200,), np.float32)
    np.testing.assert_allclose(samples, left * 0.75, atol=2.0 ** (1 - 8 * width) + 1e-6)


def test_waveforms_have_one_length(tmp_path):
    path = layouts.write_wav(tmp_path / "a.wav", np.full(100, 0.5), 1000)
    short, long = arrays.waveform(path, 0.05, 1000), arrays.waveform(path, 0.2, 1000)
    np.testing.assert_allclose(short, np.full(50, 0.5), atol=1e-4)
    np.testing.assert_allclose(long, np.r_[np.full(100, 0.5), np.zeros(100)], atol=1e-4)
    np.save(tmp_path / "a.npy", np.full(10, 2))
    assert arrays.waveform(tmp_path / "a.npy", 0.02, 1000).tolist() == [2] * 10 + [0] * 10
    with pytest.raises(UserError, match="1000 samples a second, expected 16000; ffmpeg"):
        arrays.waveform(path, 1)
    layouts.put(tmp_path / "b.wav", b"RIFF....")
    with pytest.raises(UserError, match=r"b\.wav cannot be read"):
        arrays.waveform(tmp_path / "b.wav", 1)


def test_numbers(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, 2]))
    assert arrays.numbers(tmp_path / "a.npy", 2).dtype == np.float32
    assert arrays.numbers([1, 2.5]).tolist() == [1, 2.5]
    for wrong in ([1, float("nan")], [[1]], ["a"]):
        with pytest.raises(UserError, match="a row of finite numbers"):
            arrays.numbers(wrong)
    with pytest.raises(UserError, match="2 numbers, other rows have 3"):
        arrays.numbers([1, 2], 3)
    np.save(tmp_path / "o.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(UserError, match=r"o\.npy cannot be read"):
        arrays.numbers(tmp_path / "o.npy")


# ------------------------------------------------------------------ texts


def test_clip_ids():
    """Ids of CLIP's vocabulary, as its paper's examples and code give them; cut rows end with the end of text."""
    pytest.importorskip("open_clip")
    tokenize = tokenizer()
    ids = tokenize(["a photo of a cat", "", "cat " * 100, "Châlet — “É”  \n A PHOTO"])
    assert (ids.shape, ids.dtype) == ((4, 77), torch.int64)
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert ids[1].tolist() == [49406, 49407] + [0] * 75
    assert ids[2].tolist() == [49406] + [2368] * 75 + [49407]
    assert ids.argmax(1).tolist()[:3] == [6, 1, 76]
    assert ids[3, 1:].tolist().count(1125) == 1  # lower case, white space collapsed
    from open_clip import tokenize as theirs

    assert torch.equal(ids, theirs(["a photo of a cat", "", "cat " * 100, "Châlet — “É”  \n A PHOTO"]))
    assert tokenizer("clip", 16)(["cat " * 100])[0].tolist() == [49406] + [2368] * 14 + [49407]


def test_tokenizer_of_a_folder_and_what_is_wrong_with_one(tmp_path):
    import json

    words = ["<|startoftext|>", "<|endoftext|>", "c", "a", "t</w>", "ca", "cat</w>"]
    layouts.put(tmp_path / "t" / "vocab.json", json.dumps({word: i for i, word in enumerate(words)}))
    layouts.put(tmp_path / "t" / "merges.txt", "#version: 0.2\nc a\nca t</w>\n")
    tokenize = tokenizer(str(tmp_path / "t"), 5)
    assert tokenize(["cat CAT", ""]).tolist() == [[0, 6, 6, 1, 0], [0, 1, 0, 0, 0]]
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor vocab\.json"):
        tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="expected at least 3"):
        tokenizer("clip", 2)


def test_the_extra_is_named_where_open_clip_is_not_there(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    with pytest.raises(UserError, match=r"polymodal-missing-modal\[open_clip\]"):
        tokenizer("clip", 9)
