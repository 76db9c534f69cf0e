"""DeepLabV3 against torchvision's ResNet, and its parts against what they claim."""

import math

import numpy as np
import pytest
import torch
import torchvision
from css.models.deeplab import ASPP, DeepLabV3
from polymodal.errors import UserError
from safetensors.torch import save_file
from torch import nn


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    net = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return net.eval()


@pytest.fixture(scope="module")
def file(resnet, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(resnet.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def net(file):
    torch.manual_seed(1)
    return DeepLabV3("resnet50", weights=file).eval()


@torch.no_grad()
def test_stages_are_those_of_torchvision_before_their_last_relu(resnet, net):
    x = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    out = net(x)
    expected = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    for stage, layer in zip(out.stages, (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4), strict=True):
        expected = layer(expected)
        assert stage.min() < 0
        assert torch.equal(stage.relu(), expected)
    assert out.feature.shape == (2, 256, 4, 3)
    assert torch.equal(out.feature, net.neck(expected))


def test_output_stride_8_dilates_two_stages_and_doubles_the_rates():
    net = DeepLabV3("resnet50", output_stride=8)
    with torch.no_grad():
        out = net.eval()(torch.randn(1, 3, 64, 64))
    assert net.stride == 8
    assert out.feature.shape == (1, 256, 8, 8)
    assert [branch[0].dilation for branch in net.neck.branches[1:4]] == [(12, 12), (24, 24), (36, 36)]
    assert [stage.shape[-1] for stage in out.stages] == [16, 8, 8, 8]


def test_parts_as_published(net):
    norms = [module for module in net.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.01}
    assert {norm.momentum for norm in net.neck.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.1}
    assert [branch[0].dilation for branch in net.neck.branches[1:4]] == [(6, 6), (12, 12), (18, 18)]
    assert net.neck.project[0].in_channels == 5 * 256
    assert net.neck.dropout.p == 0.1
    assert net.neck.last[0].weight.shape == (256, 256, 3, 3)
    assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))
    assert net.neck.last[0].weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.02)
    groups = [{id(p) for p in net.backbone_parameters()}, {id(p) for p in net.neck_parameters()}]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in net.parameters()}


def conv_reference(x, weight, dilation):
    """Float64 'same' convolution of (C, h, w), square kernel."""
    outs, _, size, _ = weight.shape
    reach = dilation * (size // 2)
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach)))
    _, h, w = x.shape
    result = np.zeros((outs, h, w))
    for i in range(size):
        for j in range(size):
            window = padded[:, i * dilation : i * dilation + h, j * dilation : j * dilation + w]
            result += np.einsum("oc,chw->ohw", weight[:, :, i, j], window)
    return result


@torch.no_grad()
def test_aspp_is_its_formula():
    torch.manual_seed(0)
    neck = ASPP(3, 4, rates=(1, 2, 3)).double().eval()
    x = torch.randn(1, 3, 7, 6, dtype=torch.float64)

    def block(parts, value, dilation=1):
        conv, norm = parts[0], parts[1]
        out = conv_reference(value, conv.weight.numpy(), dilation) / np.sqrt(1 + norm.eps)
        return np.maximum(out, 0)

    array = x[0].numpy()
    branches = [block(neck.branches[0], array)]
    branches += [block(neck.branches[k], array, dilation) for k, dilation in ((1, 1), (2, 2), (3, 3))]
    pooling = neck.branches[4]
    pooled = block((pooling.conv, pooling.norm), array.mean((1, 2), keepdims=True))
    branches.append(np.broadcast_to(pooled, (4, 7, 6)))
    expected = block(neck.last, block(neck.project, np.concatenate(branches)))
    assert np.allclose(neck(x)[0].numpy(), expected, atol=1e-12)


def test_aspp_trains_on_a_single_picture():
    torch.manual_seed(0)
    neck = ASPP(3, 4).train()
    before = neck.branches[4].norm.running_mean.clone()
    neck(torch.randn(1, 3, 5, 5)).sum().backward()
    assert torch.equal(neck.branches[4].norm.running_mean, before)
    assert neck.branches[4].conv.weight.grad.isfinite().all()
    neck(torch.randn(2, 3, 5, 5))
    assert not torch.equal(neck.branches[4].norm.running_mean, before)


def test_backward_reaches_every_parameter(net):
    net.train()
    out = net(torch.randn(2, 3, 32, 32))
    (out.feature.mean() + sum(stage.square().mean() for stage in out.stages)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.zero_grad()
    net.eval()


# --- weights ----------------------------------------------------------------------------------------------------


def test_weights_from_safetensors_and_with_levels_around(resnet, tmp_path):
    state = resnet.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "b.pth"
    )
    for name in ("a.safetensors", "b.pth"):
        net = DeepLabV3("resnet50", weights=tmp_path / name)
        assert torch.equal(net.backbone.layer4[2].conv3.weight, resnet.layer4[2].conv3.weight)
        assert torch.equal(net.backbone.bn1.running_mean, resnet.bn1.running_mean)


def test_weights_of_another_network_are_refused(file):
    with pytest.raises(UserError, match=r"resnet50\.pth is not torchvision's resnet101: 255 missing \(layer3\.6\."):
        DeepLabV3("resnet101", weights=file)


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_basic_blocks_are_refused_with_the_reason(name):
    with pytest.raises(UserError, match=f"BasicBlock cannot be dilated.*timm:{name}"):
        DeepLabV3(name)


def test_other_refusals():
    with pytest.raises(UserError, match="known: deeplabv3_resnet50, deeplabv3_resnet101"):
        DeepLabV3("vgg16")
    with pytest.raises(UserError, match="expected 8 or 16"):
        DeepLabV3("resnet50", output_stride=32)
    with pytest.raises(UserError, match="dropout"):
        DeepLabV3("resnet50", dropout=1.0)
