"""Backbones of timm: levels, neck, weights, refusals."""

import pytest
import torch
from css.models.timm_ import Fusion, TimmExtractor
from polymodal.errors import UserError

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(("output_stride", "levels"), [(16, 2), (8, 3)])
def test_levels_from_the_output_stride_on_are_fused(output_stride, levels):
    net = TimmExtractor("resnet18", output_stride=output_stride).eval()
    with torch.no_grad():
        out = net(torch.randn(1, 3, 64, 64))
    assert net.stride == output_stride
    assert out.feature.shape == (1, 256, 64 // output_stride, 64 // output_stride)
    assert len(net.neck.levels) == levels
    assert [stage.shape[-1] for stage in out.stages] == [32, 16, 8, 4, 2]
    groups = [{id(p) for p in net.backbone_parameters()}, {id(p) for p in net.neck_parameters()}]
    assert groups[0] | groups[1] == {id(p) for p in net.parameters()}


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)  # positions of a fixed size; channels last
def test_transformers_take_any_size(name):
    net = TimmExtractor(name).eval()
    with torch.no_grad():
        out = net(torch.randn(1, 3, 64, 96))
    assert out.feature.shape == (1, 256, 4, 6)
    assert all(stage.shape[2] * 3 == stage.shape[3] * 2 for stage in out.stages)


def test_weights_of_the_whole_model_reach_its_features(tmp_path):
    torch.manual_seed(0)
    whole = timm.create_model("resnet18").eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    net = TimmExtractor("resnet18", weights=tmp_path / "w.pth").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(net(x).stages[-1], whole.forward_features(x))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth is not timm's resnet34: 80 missing"):
        TimmExtractor("resnet34", weights=tmp_path / "w.pth")


def test_refusals():
    with pytest.raises(UserError, match="did you mean resnet18"):
        TimmExtractor("resnet18b")
    with pytest.raises(UserError, match="no model 'hf-hub:someone/model'"):
        TimmExtractor("hf-hub:someone/model")
    with pytest.raises(UserError, match="does not run on pictures of 128 pixels"):
        TimmExtractor("mixer_b32_224")


def test_fusion_has_the_size_of_its_first_map():
    torch.manual_seed(0)
    neck = Fusion((3, 5), 4).eval()
    maps = [torch.randn(2, 3, 8, 6), torch.randn(2, 5, 4, 3)]
    assert neck(maps).shape == (2, 4, 8, 6)
    changed = neck([maps[0], maps[1] + 1])
    assert not torch.equal(changed, neck(maps))
