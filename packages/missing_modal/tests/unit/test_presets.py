"""Every preset parses, is headed as promised, and the published ones have the published numbers (DCP 3.6)."""

from __future__ import annotations

from importlib.resources import files

import pytest
from missing_modal.data import READERS
from missing_modal.methods import METHODS
from missing_modal.settings import MMConfig
from polymodal.cli import parse_config, preset_names

NAMES = preset_names("missing_modal")


def load(name, *arguments):
    return parse_config(MMConfig, ["--config", name, *arguments], presets="missing_modal", choices={"data": READERS})


@pytest.mark.parametrize("name", NAMES)
def test_preset(name):
    config = load(name)
    METHODS.create(config.method, **config.options_of_method())
    for method, options in config.defaults_by_method.items():
        METHODS.create(method, **options)
    lines = (files("missing_modal") / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# mm-train")
    head = [line for line in lines if line.startswith("#")]
    assert any(line.startswith("# Data:") for line in head)
    assert any(word in " ".join(head) for word in ("Time", "minute"))


@pytest.mark.parametrize(("name", "metric"), [("mmimdb", "f1_macro"), ("food101", "accuracy"), ("hatememes", "auroc")])
def test_published_settings(name, metric):
    config = load(name, "--data.root", "somewhere")
    assert config.data.name == name
    assert config.data.metric == metric
    assert (config.missing.kind, config.missing.ratio) == ("both", 0.7)
    assert config.loader.batch_size * config.trainer.accumulate == 256
    assert (config.trainer.max_epochs, config.trainer.clip_grad) == (20, 0)
    assert config.trainer.extra == {"val_check_interval": 0.11 if name == "hatememes" else 0.2}
    optim = config.optim
    assert (optim.lr, optim.lr_out, optim.weight_decay, optim.warmup) == (1e-2, 1e-2, 2e-2, 0.1)
    assert (tuple(optim.betas), optim.eps) == ((0.9, 0.98), 1e-8)
    method = METHODS.create(config.method, **config.options_of_method())
    assert (config.method, method.length, method.depth) == ("dcp", 36, 6)
    assert config.backbone.name == "open_clip:ViT-B-16-quickgelu"


def test_own_rows_keep_what_they_have():
    config = load("manifest")
    assert (config.missing.kind, config.missing.ratio) == ("none", 0)
