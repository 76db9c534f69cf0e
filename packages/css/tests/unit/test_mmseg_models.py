"""Segmentors of mmsegmentation under our heads."""

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from css.models.build import build_network
from css.settings import NetworkConfig
from polymodal.errors import UserError
from torch import nn

pytest.importorskip("mmseg")
from css.models.mmseg_ import MMSegExtractor, find_config, import_mmseg, shipped_configs

import_mmseg("mmseg.models")  # the references below build models themselves, which upstream cannot do unaided
PLAIN = SimpleNamespace(detach_background=True, head="linear", unknown=False)
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = """
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    pretrained="open-mmlab://resnet18_v1c",
    data_preprocessor=dict(type="SegDataPreProcessor", mean=[0, 0, 0], std=[1, 1, 1]),
    backbone=dict(type="ResNetV1c", depth=18, base_channels=8, num_stages=4, out_indices=(0, 1, 2, 3),
                  dilations=(1, 1, 1, 2), strides=(1, 2, 2, 1), norm_cfg=norm_cfg, contract_dilation=True,
                  init_cfg=dict(type="Pretrained", checkpoint="https://nowhere.invalid/weights.pth")),
    decode_head={head},
    auxiliary_head=dict(type="FCNHead", in_channels=32, in_index=2, channels=8, num_classes=3, norm_cfg=norm_cfg),
    train_cfg=dict(), test_cfg=dict(mode="whole"))
"""
ASPP = (
    'dict(type="ASPPHead", in_channels=64, in_index=3, channels=12, dilations=(1, 2), num_classes=3,'
    " dropout_ratio=0.1, norm_cfg=norm_cfg, align_corners=False)"
)
ENC = (
    'dict(type="EncHead", in_channels=[16, 32, 64], in_index=(1, 2, 3), channels=12, num_codes=4, use_se_loss=True,'
    " add_lateral=False, num_classes=3, norm_cfg=norm_cfg)"
)


@pytest.fixture
def small(tmp_path):
    def write(head=ASPP, name="small.py"):
        path = tmp_path / name
        path.write_text(SMALL.replace("{head}", head))
        return path

    return write


def segmentor(path):
    """The same model through mmsegmentation's own doors, without what would be downloaded."""
    from mmengine.config import Config
    from mmengine.model.utils import revert_sync_batchnorm
    from mmseg.registry import MODELS

    config = Config.fromfile(str(path)).model
    config.pretrained = config.data_preprocessor = None
    config.backbone.init_cfg = None
    return revert_sync_batchnorm(MODELS.build(config)).eval()


def varied(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) * 0.2 + 0.01)
    return model


@torch.no_grad()
def test_features_are_those_before_the_classifier(small, tmp_path):
    path = small()
    theirs = varied(segmentor(path))
    torch.save({"state_dict": theirs.state_dict(), "meta": {"epoch": 1}}, tmp_path / "w.pth")
    ours = MMSegExtractor(path, weights=tmp_path / "w.pth").eval()
    maps = theirs.extract_feat(X)
    out = ours(X)
    assert torch.equal(out.feature, theirs.decode_head._forward_feature(maps))
    assert torch.equal(theirs.decode_head.conv_seg(out.feature), theirs.decode_head(maps))
    assert all(torch.equal(a, b) for a, b in zip(out.stages, maps, strict=True))
    assert ours.stride == 16
    assert ours.out_channels == 12


@torch.no_grad()
def test_segformer_b0_is_theirs_before_its_classifier(tmp_path):
    theirs = varied(segmentor_of_shipped())
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = MMSegExtractor("segformer_b0", weights=tmp_path / "w.pth").eval()
    assert torch.equal(theirs.decode_head.conv_seg(ours(X).feature), theirs.decode_head(theirs.extract_feat(X)))
    assert ours.stride == 4
    assert 3.6e6 < sum(p.numel() for p in ours.parameters()) < 3.8e6


def segmentor_of_shipped():
    from mmengine.config import Config
    from mmseg.registry import MODELS

    return MODELS.build(Config.fromfile(str(shipped_configs()["segformer_b0"])).model).eval()


def test_no_synchronised_norm_no_auxiliary_head_no_classifier_is_left(small):
    net = MMSegExtractor(small())
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in net.modules())
    names = [name for name, _ in net.named_parameters()]
    assert not any("auxiliary" in name or "conv_seg" in name for name in names)
    groups = [{id(p) for p in net.backbone_parameters()}, {id(p) for p in net.neck_parameters()}]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in net.parameters()}


@pytest.mark.parametrize("head", [ASPP, ENC])
def test_training_reaches_every_trained_parameter(small, head):
    torch.manual_seed(0)
    config = NetworkConfig(name=f"mmseg:{small(head)}")
    net = build_network(config, (2, 1), method=PLAIN).train()
    net.full_logits(X).square().mean().backward()
    missing = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert all("se_layer" in name for name in frozen)  # of EncHead: a loss of its own, that nothing here asks for
    assert bool(frozen) == (head == ENC)


def test_state_survives_a_round_trip_to_the_bit(small):
    config = NetworkConfig(name=f"mmseg:{small()}")
    net = build_network(config, (2,), method=PLAIN).eval()
    other = build_network(config, (2,), method=PLAIN).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(net.full_logits(X), other.full_logits(X))


def test_frozen_norms_stay(small):
    net = build_network(NetworkConfig(name=f"mmseg:{small()}"), (2,), method=PLAIN)
    net.freeze_norm()
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items() if "running" in name}
    assert before
    assert torch.equal(net.full_logits(X), net.full_logits(X))  # its dropout is off too
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


# --- weights ------------------------------------------------------------------------------------------------------


def test_checkpoint_of_their_trainer_with_its_history_is_read(small, tmp_path):
    import numpy as np
    from mmengine.logging import HistoryBuffer

    path = small()
    theirs = varied(segmentor(path))
    history = HistoryBuffer()
    history.update(np.float64(0.25), 1)
    hub = {"log_scalars": {"train/loss": history}, "resumed_keys": {"train/loss": True}, "runtime_info": {"iter": 3}}
    torch.save({"meta": {}, "state_dict": theirs.state_dict(), "message_hub": hub}, tmp_path / "iter_3.pth")
    ours = MMSegExtractor(path, weights=tmp_path / "iter_3.pth")
    assert torch.equal(ours.model.backbone.layer1[0].conv1.weight, theirs.backbone.layer1[0].conv1.weight)


def test_weights_of_a_backbone_alone(small, tmp_path):
    path = small()
    theirs = varied(segmentor(path))
    state = {**theirs.backbone.state_dict(), "fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}
    torch.save(state, tmp_path / "backbone.pth")
    ours = MMSegExtractor(path, weights=tmp_path / "backbone.pth")
    assert torch.equal(ours.model.backbone.layer4[0].conv1.weight, theirs.backbone.layer4[0].conv1.weight)
    assert not torch.equal(
        ours.model.decode_head.bottleneck.conv.weight, theirs.decode_head.bottleneck.conv.weight
    )  # stays random


def test_weights_of_another_segmentor_are_refused(small, tmp_path):
    torch.save(segmentor_of_shipped().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth is not a checkpoint of this segmentor with ResNetV1c: \d+ missing"):
        MMSegExtractor(small(), weights=tmp_path / "w.pth")


# --- configurations -------------------------------------------------------------------------------------------------


def test_names_of_configurations(small):
    assert find_config("segformer_b0") == shipped_configs()["segformer_b0"]
    assert find_config(str(small())) == small()
    theirs = find_config("segformer_mit-b0_8xb2-160k_ade20k-512x512")
    assert theirs.parent.name == "segformer"
    assert find_config("segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py") == theirs
    with pytest.raises(UserError, match=r"did you mean segformer_b0 .*shipped: segformer_b0"):
        find_config("segformer_b00")
    with pytest.raises(UserError, match="no file and no configuration"):
        find_config("a/b")


def test_a_configuration_that_mmsegmentation_ships_is_built():
    net = MMSegExtractor("mobilenet_v2/mobilenet-v2-d8_fcn_4xb2-80k_cityscapes-512x1024").eval()
    with torch.no_grad():
        assert net(X).feature.shape == (2, net.out_channels, 8, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(", "cannot read the configuration .*small"),
        ("x = 1", "has no model with backbone and decode_head"),
        ('model = dict(type="EncoderDecoder", backbone=dict(type="Nothing"), decode_head=dict())', "cannot build"),
        ('model = dict(type="CascadeEncoderDecoder", backbone=dict(), decode_head=[dict()])', "several decode heads"),
        (
            SMALL.replace(
                "{head}",
                'dict(type="SegmenterMaskTransformerHead", in_channels=64, in_index=3, channels=64, num_classes=3,'
                " num_layers=1, num_heads=2, embed_dims=64, dropout_ratio=0.0)",
            ),
            "SegmenterMaskTransformerHead has no conv_seg",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, text, message):
    (tmp_path / "small.py").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        MMSegExtractor(tmp_path / "small.py")
    assert "\n" not in str(caught.value)


def test_nothing_is_said_while_it_is_built():
    code = "from css.models.mmseg_ import MMSegExtractor; MMSegExtractor('segformer_b0')"
    result = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True, cwd=Path.home()
    )
    assert result.stdout == ""
    assert result.stderr == ""


def test_the_level_of_their_logger_is_as_it_was(small):
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    logger.setLevel(logging.WARNING)
    try:
        MMSegExtractor(small())
        assert logger.level == logging.WARNING
    finally:
        logger.setLevel(logging.NOTSET)


def test_operators_that_mmcv_lite_lacks_fail_only_when_called(monkeypatch):
    """Upstream's mmsegmentation imports them; the whole of this file also passes with mmsegmentation 1.2.2."""
    import importlib.metadata

    from css.models import mmseg_

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.2")
    monkeypatch.delitem(sys.modules, "mmcv._ext", raising=False)
    mmseg_._placeholder_ops()
    placeholder = sys.modules.pop("mmcv._ext")
    assert placeholder.__spec__.loader is None  # mmengine asks it whether the operators are there
    with pytest.raises(NotImplementedError, match="roi_align is a compiled operator"):
        placeholder.roi_align(1, size=2)
    with pytest.raises(AttributeError):
        _ = placeholder.__file__
