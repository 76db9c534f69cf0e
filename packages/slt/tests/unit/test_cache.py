"""Frame and feature caches: same values as without, never a stale entry, off where it would be wrong."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from polymodal.data import ArrayCache
from polymodal.errors import UserError
from slt.data import cache
from slt.data.cache import (
    build_feature_cache,
    build_frame_cache,
    clip_key,
    weights_hash,
    with_feature_cache,
    with_frame_cache,
)
from slt.data.dataset import SLTDataset
from slt.data.manifest import Manifest
from slt.data.options import LoaderConfig
from torch import nn


@pytest.fixture
def reader(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "index"))
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    for number, split in enumerate(("train", "dev", "test")):
        rows = []
        for clip in range(2):
            name = f"{split}-{clip}"
            (root / name).mkdir(parents=True)
            for frame in range(3 + clip + number):
                pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / name / f"{frame}.png")
            rows.append(f'{{"video_id": "{name}", "video": "{name}", "sentence": "ein satz"}}')
        (root / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return Manifest(root=root)


class Mean(nn.Module):
    """Features of a frame: mean of each channel, scaled."""

    def __init__(self, scale=0.5):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.register_buffer("table", torch.zeros(2, dtype=torch.bfloat16))

    def forward(self, frames):
        assert not self.training
        return frames.float().mean((2, 3)) * self.scale


OPTIONS = LoaderConfig(frame_size=16, resize=24, augment="none", question_dropout=0.0)


@pytest.mark.parametrize("workers", [1, 3])
def test_evaluation_does_not_see_the_cache(tmp_path, reader, workers):
    seen = []
    total = build_frame_cache(
        reader, tmp_path / "c", size=24, workers=workers, progress=lambda done, every: seen.append((done, every))
    )
    frames = sum(i.num_frames for s in ("train", "dev", "test") for i in reader.items(s))
    assert total == {"clips": 6, "frames": frames, "bytes": frames * 24 * 24 * 3}
    assert seen == [(n, 6) for n in range(1, 7)]
    cached = with_frame_cache(reader, tmp_path / "c", 24)
    for split in ("dev", "test"):
        plain, fast = SLTDataset(reader, split, OPTIONS), SLTDataset(cached, split, OPTIONS)
        for index in range(2):
            torch.testing.assert_close(fast[index].frames, plain[index].frames, rtol=0, atol=0)
    assert (cached.name, cached.level, cached.modality) == ("manifest", "word", "frames")
    assert cached.fingerprint() == reader.fingerprint()


def test_frames_come_from_the_cache_and_survive_pickling(tmp_path, reader, monkeypatch):
    build_frame_cache(reader, tmp_path / "c", size=24, splits=("train",))
    monkeypatch.setattr(Manifest, "load", lambda *_: pytest.fail("decoded again"))
    cached = pickle.loads(pickle.dumps(with_frame_cache(reader, tmp_path / "c", 24)))
    item = cached.items("train")[1]
    got = cached.load(item, [0, 2, 2])
    assert got.shape == (3, 24, 24, 3)
    got[:] = 0  # a copy: the cache stays as it is
    monkeypatch.setattr(cache, "clip_key", lambda *_: pytest.fail("looked at the source again"))
    assert cached.load(item, [0]).any()


def test_a_changed_clip_is_not_served(tmp_path, reader):
    build_frame_cache(reader, tmp_path / "c", size=24)
    item = reader.items("train")[0]
    Image.new("RGB", (20, 30)).save(f"{item.source[0]}/0.png")
    cached = with_frame_cache(reader, tmp_path / "c", 24)
    with pytest.raises(UserError, match=r"no clip train-0 as it is now.*slt-data cache --data manifest --size 24"):
        cached.load(item, [0])
    assert cached.load(reader.items("train")[1], [0]).shape == (1, 24, 24, 3)


def test_another_size_is_refused(tmp_path, reader):
    build_frame_cache(reader, tmp_path / "c", size=24, splits=("dev",))
    with pytest.raises(UserError, match=r"was made with .*24x24.*wanted is .*32x32"):
        with_frame_cache(reader, tmp_path / "c", 32)
    with pytest.raises(UserError, match="exists"):
        build_frame_cache(reader, tmp_path / "c", size=32)
    build_frame_cache(reader, tmp_path / "c", size=32, splits=("dev",), overwrite=True)
    assert len(ArrayCache(tmp_path / "c")) == 2


def test_what_cannot_be_cached_is_said(tmp_path, reader, monkeypatch):
    with pytest.raises(UserError, match="size=0"):
        build_frame_cache(reader, tmp_path / "c", size=0)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"needs 0\.0 GiB.*--size"):
        build_frame_cache(reader, tmp_path / "c", size=24)
    monkeypatch.setattr(Manifest, "modality", "pose")
    with pytest.raises(UserError, match="manifest gives pose"):
        build_frame_cache(reader, tmp_path / "c")
    with pytest.raises(UserError, match="manifest gives pose"):
        build_feature_cache(reader, Mean(), tmp_path / "c")


def test_a_broken_clip_leaves_no_cache(tmp_path, reader):
    item = reader.items("test")[1]
    with Path(item.source[0], "1.png").open("r+b") as file:
        file.truncate(60)
    with pytest.raises(UserError, match=r"1\.png"):
        build_frame_cache(reader, tmp_path / "c", size=24)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "index"]


def test_features_are_those_of_the_backbone(tmp_path, reader):
    backbone = Mean()
    total = build_feature_cache(reader, backbone.train(), tmp_path / "f", frame_size=16, resize=24, max_pass=2)
    assert total["clips"] == 6
    cached = with_feature_cache(reader, tmp_path / "f", backbone, frame_size=16, resize=24)
    assert cached.modality == "features"
    item = reader.items("dev")[0]
    got = cached.load(item, range(item.num_frames))
    assert got.dtype == np.float16
    plain = SLTDataset(reader, "dev", OPTIONS)[0].frames
    np.testing.assert_allclose(got, backbone(plain).detach().numpy(), rtol=1e-3)
    sample = SLTDataset(cached, "dev", OPTIONS)[0]
    assert sample.frames.shape == (item.num_frames, 3)
    assert sample.frames.dtype == torch.float32


def test_features_of_other_weights_or_frames_are_refused(tmp_path, reader):
    build_feature_cache(reader, Mean(), tmp_path / "f", frame_size=16, resize=24, splits=("dev",))
    with pytest.raises(UserError, match="weights"):
        with_feature_cache(reader, tmp_path / "f", Mean(0.25), frame_size=16, resize=24)
    with pytest.raises(UserError, match="transform"):
        with_feature_cache(reader, tmp_path / "f", Mean(), frame_size=16, resize=20)


def test_features_beyond_float16_are_an_error(tmp_path, reader):
    with pytest.raises(UserError, match="clip train-0 do not fit into float16"):
        build_feature_cache(reader, Mean(1e9), tmp_path / "f", frame_size=16, resize=24)


def test_keys_and_hashes(reader):
    one, two = reader.items("train")
    assert clip_key(one, {"a": 1}) == clip_key(one, {"a": 1})
    assert len({clip_key(one, {"a": 1}), clip_key(two, {"a": 1}), clip_key(one, {"a": 2})}) == 3
    assert weights_hash(Mean()) == weights_hash(Mean())
    assert weights_hash(Mean()) != weights_hash(Mean(0.25))
