"""Contrastive training of small towers, files of towers, log-mel spectrograms."""

import math

import numpy as np
import pytest
import torch
from missing_modal.backbones.audio import log_mel
from missing_modal.backbones.base import state_hash
from missing_modal.backbones.load import load_towers
from missing_modal.backbones.pretrain import contrast, pretrain
from missing_modal.backbones.small import small_audio, small_image, small_patches, small_tabular, small_text
from missing_modal.backbones.weights import read_towers, save_towers
from polymodal.errors import UserError

SMALL = {"width": 16, "depth": 2, "features": 8}


def _world(count=64):
    """A hidden number seen by both modalities."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randint(4, (count,), generator=draw)
    image = torch.nn.functional.one_hot(hidden, 4).float()[:, None].repeat(1, 4, 1)
    image = image + 0.1 * torch.randn(image.shape, generator=draw)
    text = torch.stack([torch.full_like(hidden, 10), hidden, torch.full_like(hidden, 11)], 1)
    return {"image": image, "text": text}


def _towers(**more):
    return small_patches(4, 4, **SMALL, **more), small_text(12, 3, **SMALL, **more)


def test_contrast_is_the_symmetric_cross_entropy():
    rng = np.random.default_rng(0)
    a, b, scale = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), 1.3
    score = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    score = score * math.exp(scale)
    rows = [-math.log(math.exp(score[i, i]) / sum(math.exp(v) for v in score[i])) for i in range(3)]
    columns = [-math.log(math.exp(score[i, i]) / sum(math.exp(v) for v in score[:, i])) for i in range(3)]
    got = contrast(torch.from_numpy(a), torch.from_numpy(b), torch.tensor(scale, dtype=torch.float64))
    assert float(got) == pytest.approx((np.mean(rows) + np.mean(columns)) / 2, abs=1e-12)


def test_training_brings_pairs_together_and_leaves_the_given_towers():
    towers, inputs = _towers(), _world()
    before = [state_hash(tower) for tower in towers]
    trained = pretrain(towers, inputs, steps=40, batch_size=32)
    assert [state_hash(tower) for tower in towers] == before
    assert all(state_hash(new) != old for new, old in zip(trained, before, strict=True))
    again = pretrain(towers, inputs, steps=40, batch_size=32)
    assert [state_hash(tower) for tower in again] == [state_hash(tower) for tower in trained]
    for tower in trained:
        assert not any(value.requires_grad for value in tower.state().values())
        torch.testing.assert_close(tower.spec.projection, tower.state()["out.projection"])
    assert _alike(trained, inputs) > 0.9 > _alike(towers, inputs)


def _alike(towers, inputs):
    """How often the nearest text shows the same hidden number as the image."""
    found = []
    for tower in towers:
        x = inputs[tower.spec.name]
        h = tower.embed(x)
        for index in range(tower.spec.depth):
            h = tower.block(index, h, tower.mask(h.shape[1], h))
        row = h[torch.arange(len(h)), tower.pool_rows(x)]
        spec = tower.spec
        row = torch.nn.functional.layer_norm(row, row.shape[-1:], spec.norm_weight, spec.norm_bias, spec.norm_eps)
        found.append(torch.nn.functional.normalize(row @ spec.projection, dim=-1))
    nearest = (found[0] @ found[1].T).argmax(1)
    return float((inputs["text"][nearest, 1] == inputs["text"][:, 1]).float().mean())


def test_cache_is_read_for_the_same_settings_only(tmp_path):
    towers, inputs, cache = _towers(), _world(), tmp_path / "deep" / "towers.safetensors"
    first = pretrain(towers, inputs, steps=3, cache=cache)
    stamp = cache.stat().st_mtime_ns
    second = pretrain(towers, inputs, steps=3, cache=cache)
    assert cache.stat().st_mtime_ns == stamp
    assert [state_hash(tower) for tower in second] == [state_hash(tower) for tower in first]
    third = pretrain(towers, inputs, steps=4, cache=cache)
    assert cache.stat().st_mtime_ns != stamp
    assert state_hash(third[0]) != state_hash(first[0])
    other = pretrain(_towers(seed=1), inputs, steps=4, cache=cache)
    assert state_hash(other[0]) != state_hash(third[0])
    cache.write_bytes(b"broken")
    assert state_hash(pretrain(_towers(seed=1), inputs, steps=4, cache=cache)[0]) == state_hash(other[0])


def test_three_modalities_train_together():
    inputs = _world() | {"tabular": torch.randn(64, 5)}
    trained = pretrain((*_towers(), small_tabular(5, **SMALL)), inputs, steps=2)
    assert [tower.spec.name for tower in trained] == ["image", "text", "tabular"]


def test_no_steps_give_the_same_weights():
    towers = _towers()
    assert [state_hash(t) for t in pretrain(towers, _world(), steps=0)] == [state_hash(t) for t in towers]


def test_bad_pairs():
    inputs = _world()
    with pytest.raises(UserError, match="two towers"):
        pretrain(_towers()[:1], inputs)
    with pytest.raises(UserError, match="no inputs for text"):
        pretrain(_towers(), {"image": inputs["image"]})
    with pytest.raises(UserError, match="as many rows"):
        pretrain(_towers(), inputs | {"text": inputs["text"][:5]})


def test_every_kind_of_tower_survives_its_file(tmp_path):
    text = small_text(12, 7)
    text.tokenizer = None
    towers = [small_image(16, 8), text, small_audio(32, 64), small_tabular(7, 3), small_patches(name="view")]
    save_towers(tmp_path / "towers.safetensors", towers, {"note": "x"})
    found, about = read_towers(tmp_path / "towers.safetensors")
    assert about == {"note": "x"}
    assert [state_hash(tower) for tower in found] == [state_hash(tower) for tower in towers]
    for old, new in zip(towers, found, strict=True):
        assert type(new) is type(old)
        assert new.config() == old.config()
        held = old.placeholder(1)
        torch.testing.assert_close(new.block(0, new.embed(held), None), old.block(0, old.embed(held), None))
    loaded = load_towers(f"towers:{tmp_path / 'towers.safetensors'}")
    assert [tower.spec.name for tower in loaded] == ["image", "text", "audio", "tabular", "view"]


def test_files_of_others_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="not a file of towers"):
        read_towers(tmp_path / "a.safetensors")
    save_file(
        {"a": torch.zeros(1)},
        tmp_path / "b.safetensors",
        {"missing_modal": '{"format": "missing_modal.towers", "version": 99}'},
    )
    with pytest.raises(UserError, match="newer version"):
        read_towers(tmp_path / "b.safetensors")


def _slow_log_mel(wave, rate, mels, window, hop):
    """Frame by frame, bin by bin, in NumPy."""
    padded = np.pad(wave, window // 2, mode="reflect")
    shape = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frames = 1 + len(wave) // hop
    power = np.stack([np.abs(np.fft.rfft(padded[i * hop : i * hop + window] * shape)) ** 2 for i in range(frames)], 1)
    hertz = np.arange(window // 2 + 1) * rate / window
    scale = np.linspace(0, 2595 * math.log10(1 + rate / 1400), mels + 2)
    edges = 700 * (10 ** (scale / 2595) - 1)
    bank = np.zeros((mels, len(hertz)))
    for band in range(mels):
        low, middle, high = edges[band : band + 3]
        for place, f in enumerate(hertz):
            if low <= f <= middle:
                bank[band, place] = (f - low) / (middle - low)
            elif middle < f <= high:
                bank[band, place] = (high - f) / (high - middle)
    level = 10 * np.log10(np.maximum(bank @ power, 1e-10))
    level = np.maximum(level, level.max() - 80)
    return (level - level.mean()) / level.std()


def test_log_mel_is_the_slow_one():
    wave = np.random.default_rng(0).normal(size=1000) * 0.1 + np.sin(np.arange(1000) * 0.3)
    got = log_mel(torch.from_numpy(wave), 8000, mels=12, window=200, hop=80)
    np.testing.assert_allclose(got.numpy(), _slow_log_mel(wave, 8000, 12, 200, 80), atol=1e-9)
    both = log_mel(torch.from_numpy(np.stack([wave, wave * 0.5])), 8000, mels=12, window=200, hop=80)
    torch.testing.assert_close(both[0], both[1], atol=1e-6, rtol=0)  # loudness is taken out


def test_silence_and_bad_clips():
    assert log_mel(torch.zeros(800), 8000, mels=8, window=200).abs().max() == 0
    with pytest.raises(UserError, match="more than 100"):
        log_mel(torch.zeros(100), 8000, window=200)
    with pytest.raises(UserError, match="not finite"):
        log_mel(torch.full((800,), float("nan")), 8000, window=200)
