"""The tiny network: sizes, stages, and that it can learn."""

import pytest
import torch
import torch.nn.functional as F
from css.models.network import CSSNet
from css.models.tiny import TinyExtractor
from polymodal.errors import UserError
from torch import nn


@pytest.mark.parametrize(("stride", "side"), [(4, 64), (2, 32), (4, 50)])
def test_sizes(stride, side):
    net = TinyExtractor(5, stride)
    out = net(torch.randn(2, 3, side, side))
    small = -(-side // stride)
    assert out.feature.shape == (2, net.out_channels, small, small)
    assert [stage.shape[1] for stage in out.stages] == [5, 10, 10]
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == 6
    assert sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) == 6
    assert {id(p) for p in net.backbone_parameters()} == {id(p) for p in net.parameters()}
    assert list(net.neck_parameters()) == []


def test_stages_are_before_the_last_relu():
    out = TinyExtractor(5)(torch.randn(2, 3, 32, 32))
    assert all(stage.min() < 0 for stage in out.stages)
    assert torch.equal(out.feature, out.stages[-1].relu())


def test_refuses_what_is_not_possible():
    with pytest.raises(UserError, match=r"network\.width=0"):
        TinyExtractor(0)
    with pytest.raises(UserError, match="2 or 4"):
        TinyExtractor(5, 8)


def test_fits_a_few_pictures():
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(4, 32, 32, dtype=torch.long)
    for i in range(4):
        labels[i, 4 + i : 16 + i, 8:24] = 1
        labels[i, 20:30, 2 * i : 2 * i + 10] = 2
    colours = torch.tensor([[0.0, 0, 0], [1, 0, 1], [0, 1, 0]])
    pictures = colours[labels].permute(0, 3, 1, 2) + 0.1 * torch.randn(4, 3, 32, 32, generator=generator)
    torch.manual_seed(0)
    net = CSSNet(TinyExtractor(8), (2,))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    target = F.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    for _ in range(40):
        loss = F.binary_cross_entropy_with_logits(net.full_logits(pictures), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (net.eval().full_logits(pictures).argmax(1) == labels).float().mean()
    assert right > 0.9
