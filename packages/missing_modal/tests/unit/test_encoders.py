"""Small encoders made for the data: shapes of the samples, training once, the cache."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from missing_modal.backbones.base import state_hash
from missing_modal.backbones.small import small_patches, small_text
from missing_modal.backbones.weights import save_towers
from missing_modal.data.base import MMData, Sample
from missing_modal.data.manifest import Manifest
from missing_modal.encoders import build_towers, small_towers
from missing_modal.inputs import ByteTokens, input_transforms
from missing_modal.settings import BackboneConfig
from missing_modal.world import World
from polymodal.errors import UserError

TINY = BackboneConfig(width=8, depth=1, heads=2, features=4, steps=3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def manifest_of(tmp_path, header=None, **columns):
    lines = [] if header is None else [{"schema": "missing_modal.manifest", "schema_version": 1, **header}]
    for number in range(8):
        row = {"id": f"r{number}", "label": number % 2, "split": "train" if number < 6 else "test"}
        lines.append({**row, **{name: values[number % len(values)] for name, values in columns.items()}})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Manifest(root=path)


def test_the_worlds_encoders_have_its_shapes():
    image, text = small_towers(TINY, World(sizes=(40, 2, 2)), ("image", "text"))
    world = World(sizes=(40, 2, 2)).samples("train")[0].inputs
    assert image.embed(torch.as_tensor(world["image"])[None]).shape == (1, 9, 8)
    assert text.embed(torch.as_tensor(world["text"])[None]).shape == (1, 5, 8)
    assert text.end == 26, "the end of text is the largest id there is"


def test_texts_become_bytes_and_numbers_tokens(tmp_path):
    reader = manifest_of(tmp_path, text=["a", "longest text", None], tabular=[list(range(40))])
    text, tabular = small_towers(TINY, reader, reader.modalities)
    assert text.context == len("longest text") + 2
    assert isinstance(text.tokenizer, ByteTokens)
    assert tabular.inputs == 40
    rows = input_transforms((text, tabular), reader.kinds)
    assert text.embed(rows["text"]("longest text")[None]).shape == (1, 14, 8)
    assert tabular.embed(rows["tabular"](list(range(40)))[None]).shape == (1, 1 + 14, 8), "three numbers a token"


def test_long_texts_have_as_many_positions_as_the_setting_says(tmp_path):
    reader = manifest_of(tmp_path, text=["x" * 500], tabular=[[1.0]])
    assert small_towers(TINY, reader, ("text",))[0].context == 77


def test_a_modality_that_no_sample_has(tmp_path):
    reader = manifest_of(tmp_path, {"modalities": {"text": "text", "extra": "tabular"}}, text=["a"])
    with pytest.raises(UserError, match="no training sample has extra"):
        build_towers(TINY, reader)


def test_encoders_are_trained_once_and_then_read(cache, caplog):
    world = World(sizes=(40, 2, 2))
    with caplog.at_level(logging.INFO, "missing_modal"):
        first = build_towers(TINY, world)
        assert "training the small encoders for 3 steps" in caplog.text
        caplog.clear()
        again = build_towers(TINY, world)
        assert not caplog.text
    assert [state_hash(tower) for tower in first] == [state_hash(tower) for tower in again]
    fresh = small_towers(TINY, world, world.modalities)
    assert state_hash(first[0]) != state_hash(fresh[0])
    assert len(list((cache / "missing_modal" / "towers").glob("world-*.safetensors"))) == 1


def test_no_steps_leave_random_weights(cache):
    config = BackboneConfig(width=8, depth=1, heads=2, features=4, steps=0)
    world = World(sizes=(40, 2, 2))
    found = build_towers(config, world)
    assert state_hash(found[0]) == state_hash(small_towers(config, world, world.modalities)[0])
    assert not cache.exists()


def test_own_rows_are_trained_on_where_they_are_complete(tmp_path):
    reader = manifest_of(tmp_path, text=["a", "b", None], tabular=[[1.0], [2.0]])
    trained = build_towers(TINY, reader)
    assert [tower.spec.name for tower in trained] == ["text", "tabular"]
    assert isinstance(trained[0].tokenizer, ByteTokens), "files of weights have no tokenizer"
    lonely = manifest_of(tmp_path, text=["a", None], tabular=[None, [2.0]])
    with pytest.raises(UserError, match="0 training samples have all modalities"):
        build_towers(TINY, lonely)


def test_a_file_of_encoders(tmp_path):
    sizes = {"width": 8, "depth": 1, "heads": 2, "features": 4}
    save_towers(tmp_path / "t.safetensors", [small_text(27, 5, **sizes), small_patches(8, 4, **sizes)])
    config = BackboneConfig(weights=tmp_path / "t.safetensors")
    assert [tower.spec.name for tower in build_towers(config, World(sizes=(4, 2, 2)))] == ["image", "text"]
    named = BackboneConfig(name=f"towers:{tmp_path / 't.safetensors'}")
    assert [tower.spec.name for tower in build_towers(named, World(sizes=(4, 2, 2)))] == ["image", "text"]


def test_published_encoders_are_joined_by_small_ones_for_other_kinds(tmp_path, caplog):
    sizes = {"width": 8, "depth": 1, "heads": 2, "features": 4}
    save_towers(tmp_path / "t.safetensors", [small_patches(8, 4, **sizes), small_text(27, 5, **sizes)])
    config = BackboneConfig(name=f"towers:{tmp_path / 't.safetensors'}", width=8, features=4, depth=1)

    class Mixed(MMData):
        name = "mixed"
        modalities = ("image", "text", "tabular")

        def read_split(self, split):
            inputs = {"image": np.zeros((8, 4)), "text": np.zeros(5, np.int64), "tabular": [1.0, 2.0]}
            return [Sample("a", inputs, 0)]

    with caplog.at_level(logging.WARNING, "missing_modal"):
        found = build_towers(config, Mixed())
    assert [tower.spec.name for tower in found] == ["image", "text", "tabular"]
    assert "tabular: small encoders with random weights" in caplog.text

    class Views(Mixed):
        modalities = ("image", "text", "side")
        kinds = {"image": "image", "text": "text", "side": "image"}  # noqa: RUF012

    with pytest.raises(UserError, match="the data has side"):
        build_towers(config, Views())


def test_a_published_encoder_without_weights_names_both_ways_out():
    with pytest.raises(UserError, match=r"needs weights; give --backbone.weights FILE .* or --backbone small"):
        build_towers(BackboneConfig(name="open_clip:ViT-B-16-quickgelu"), World())
