"""Raw values to rows of towers."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from missing_modal.backbones.small import small_audio, small_image, small_patches, small_tabular, small_text
from missing_modal.inputs import ArrayInput, AudioInput, ByteTokens, TabularInput, TextInput, input_transforms
from PIL import Image
from polymodal.errors import UserError

SIZES = {"width": 8, "depth": 1, "heads": 2, "features": 4}


def png(width=40, height=30, color=(255, 0, 0)):
    stream = io.BytesIO()
    Image.new("RGB", (width, height), color).save(stream, "PNG")
    return stream.getvalue()


def test_arrays_and_tensors_pass_as_they_are():
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert torch.equal(ArrayInput()(value), torch.from_numpy(value))
    tensor = torch.ones(2)
    assert ArrayInput()(tensor) is tensor
    with pytest.raises(UserError, match="a list where this encoder takes arrays"):
        ArrayInput()([1, 2])


def test_bytes_as_tokens():
    tokens = ByteTokens(6)
    assert tokens(["ab", "", "longer"]).tolist() == [
        [257, 98, 99, 258, 0, 0], [257, 258, 0, 0, 0, 0], [257, 109, 112, 111, 104, 258],
    ]  # fmt: skip
    assert int(tokens(["é\x00"]).max()) < tokens.vocabulary
    assert tokens(["é"])[0, :4].tolist() == [257, 0xC3 + 1, 0xA9 + 1, 258]
    assert int(tokens(["\x00"])[0, 1]) == 1, "no byte is the padding"


def test_a_sound_fills_the_frames_and_is_normalised_over_them():
    frames = 48
    for length in (9000, 40_000):
        found = AudioInput(32, frames)(np.sin(np.arange(length) ** 1.3 / 50).astype(np.float32))
        assert found.shape == (32, frames)
        assert float(found.mean()) == pytest.approx(0, abs=1e-5)
        assert float(found.square().mean()) == pytest.approx(1, abs=1e-4)


def test_each_kind_gets_what_its_tower_takes():
    text = small_text(ByteTokens.vocabulary, 7, name="text", **SIZES)
    text.tokenizer = ByteTokens(7)
    towers = [small_image(name="image", **SIZES), text, small_audio(32, 48, name="audio", **SIZES)]
    towers.append(small_tabular(3, name="numbers", **SIZES))
    kinds = {"image": "image", "text": "text", "audio": "audio", "numbers": "tabular"}
    found = input_transforms(towers, kinds)
    rows = {
        "image": found["image"](png()),
        "text": found["text"]("words"),
        "audio": found["audio"](np.sin(np.arange(9000) / 7).astype(np.float32)),
        "numbers": found["numbers"]([1, 2.5, -3]),
    }
    assert {name: tuple(row.shape) for name, row in rows.items()} == {
        "image": (3, 32, 32), "text": (7,), "audio": (32, 48), "numbers": (3,),
    }  # fmt: skip
    for tower in towers:
        assert tower.embed(rows[tower.spec.name][None]).shape[-1] == 8


def test_pictures_are_normalised_as_the_tower_was_trained():
    tower = small_image(**SIZES)  # mean and deviation 0.5
    row = input_transforms([tower], {"image": "image"})["image"](png())
    assert row[0].unique().tolist() == [1.0]
    assert row[1:].unique().tolist() == [-1.0]


def test_arrays_of_bytes_are_pictures_and_float_arrays_are_not():
    image = input_transforms([small_image(**SIZES)], {"image": "image"})["image"]
    picture = np.zeros((40, 30, 3), np.uint8)
    assert image(picture).unique().tolist() == [-1.0]
    assert image(Image.fromarray(picture)).shape == (3, 32, 32)
    ready = np.full((3, 32, 32), 0.25, np.float32)
    assert torch.equal(image(ready), torch.from_numpy(ready))


def test_transforms_travel_to_workers():
    text = small_text(ByteTokens.vocabulary, 7, **SIZES)
    text.tokenizer = ByteTokens(7)
    found = input_transforms([small_image(**SIZES), text], {"image": "image", "text": "text"})
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again["image"](png()), found["image"](png()))
    assert torch.equal(again["text"]("a"), found["text"]("a"))


def test_a_sound_of_any_length_fills_the_tower():
    audio = AudioInput(16, 32)
    for samples in (4000, 80_000):
        row = audio(np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32))
        assert row.shape == (16, 32)
    spectrogram = np.zeros((16, 32), np.float32)
    assert torch.equal(audio(spectrogram), torch.zeros(16, 32))


def test_values_that_do_not_fit_are_refused():
    tower = small_patches(name="text", **SIZES)
    with pytest.raises(UserError, match="a text where this encoder takes arrays"):
        input_transforms([tower], {"text": "text"})["text"]("words")
    with pytest.raises(UserError, match="expected a string"):
        TextInput(ByteTokens(5))(3)
    with pytest.raises(UserError, match="2 numbers"):
        TabularInput(3)([1.0, 2.0])
