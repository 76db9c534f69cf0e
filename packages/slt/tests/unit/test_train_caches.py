"""Training from caches: the same batches as without, and errors for combinations that cannot work."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from polymodal.cli import parse_config
from polymodal.errors import UserError
from slt.data import READERS
from slt.data.cache import build_feature_cache, build_frame_cache
from slt.models.backbones import build_backbone
from slt.settings import SLTConfig
from slt.train import cached_reader, data_module, make_tokenizer


@pytest.fixture
def config(tmp_path: Path) -> SLTConfig:
    arguments = ["--config", "smoke", "--data.sizes", "[6, 3, 3]", "--data.root", str(tmp_path)]
    return parse_config(SLTConfig, arguments, presets="slt", choices={"data": READERS})


def first_batch(config: SLTConfig) -> torch.Tensor:
    return next(iter(data_module(config, make_tokenizer(config)).loader("train", train=True))).frames


def test_frame_cache_gives_the_same_batches(config: SLTConfig, tmp_path: Path) -> None:
    build_frame_cache(config.data, tmp_path / "cache", size=24)
    cached = dataclasses.replace(config, loader=dataclasses.replace(config.loader, frame_cache=tmp_path / "cache"))
    assert type(cached_reader(cached)).__name__ == "CachedReader"
    assert torch.equal(first_batch(cached), first_batch(config))
    build_frame_cache(config.data, tmp_path / "other", size=12)
    other = dataclasses.replace(config, loader=dataclasses.replace(config.loader, frame_cache=tmp_path / "other"))
    with pytest.raises(UserError, match="build another one"):
        cached_reader(other)


def test_feature_cache_feeds_the_features_backbone(config: SLTConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    frozen = build_backbone(dataclasses.replace(config.model, backbone="resnet18"))
    weights = tmp_path / "resnet18.pth"
    torch.save(frozen.network.state_dict(), weights)
    build_feature_cache(config.data, frozen, tmp_path / "features", frame_size=24, resize=None)
    model = dataclasses.replace(config.model, backbone="features", backbone_weights=str(weights))
    loader = dataclasses.replace(config.loader, feature_cache=tmp_path / "features")
    frames = first_batch(dataclasses.replace(config, model=model, loader=loader))
    assert frames.shape[1] == 512
    assert frames.dtype == torch.float32


def test_combinations_that_cannot_work(config: SLTConfig, tmp_path: Path) -> None:
    features = dataclasses.replace(config.model, backbone="features")
    with pytest.raises(UserError, match="go together"):
        cached_reader(dataclasses.replace(config, model=features))
    loader = dataclasses.replace(config.loader, feature_cache=tmp_path, augment="paper")
    with pytest.raises(UserError, match="augment none"):
        cached_reader(dataclasses.replace(config, model=features, loader=loader))
