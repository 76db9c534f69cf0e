"""DeepLabV3 on torchvision's ResNets, as DKD and EIR use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from polymodal.errors import UserError
from polymodal.weights import load_tensors
from torch import Tensor, nn
from torchvision.models import resnet

from css.models.base import FeatureExtractor, Features
from css.models.heads import kaiming
from css.models.weights import fill

__all__ = ["ASPP", "DeepLabV3", "conv_norm_relu"]

BACKBONES = ("resnet50", "resnet101")
_DILATED = {8: (False, True, True), 16: (False, False, True)}
_BACKBONE_MOMENTUM = 0.01


def conv_norm_relu(inputs: int, outputs: int, size: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution without bias that keeps height and width, batch normalisation, ReLU."""
    padding = dilation * (size // 2)
    conv = nn.Conv2d(inputs, outputs, size, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class _ImagePooling(nn.Module):
    """Mean over the picture, 1x1 convolution, normalisation, ReLU, spread over the map again."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h, w)."""
        pooled = self.conv(x.mean((2, 3), keepdim=True))
        norm = self.norm
        if len(pooled) > 1 or not self.training:
            pooled = norm(pooled)
        else:
            # One value a channel has no variance: the last batch of an epoch may be a single picture.
            pooled = F.batch_norm(
                pooled, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
            )
        return F.relu(pooled).expand(-1, -1, *x.shape[-2:])


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling and the further 3x3 convolution before the heads.

    1x1, 3x3 at three rates and image pooling, each to ``width`` channels; concatenated, 1x1 convolution, dropout,
    3x3 convolution. Each convolution has batch normalisation and ReLU. Weights are Kaiming-normal.

    Args:
        inputs: channels of the backbone.
        width: channels D of the result.
        rates: dilations of the 3x3 convolutions.
        dropout: probability, 0..1.

    Source: Chen et al. 2017, arXiv 1706.05587; the last convolution and dropout 0.1 are DKD's.
    """

    def __init__(
        self, inputs: int, width: int = 256, rates: tuple[int, ...] = (6, 12, 18), dropout: float = 0.1
    ) -> None:
        super().__init__()
        branches: list[nn.Module] = [conv_norm_relu(inputs, width)]
        branches += [conv_norm_relu(inputs, width, 3, rate) for rate in rates]
        branches.append(_ImagePooling(inputs, width))
        self.branches = nn.ModuleList(branches)
        self.project = conv_norm_relu(len(branches) * width, width)
        self.dropout = nn.Dropout(dropout)
        self.last = conv_norm_relu(width, width, 3)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, width, h, w)."""
        x = self.project(torch.cat([branch(x) for branch in self.branches], dim=1))
        features: Tensor = self.last(self.dropout(x))
        return features


class DeepLabV3(FeatureExtractor):
    """Dilated ResNet and ASPP.

    ``stages`` are the four stages of the ResNet before their last ReLU: "activations at the end of each backbone stage"
    of PLOP are taken there by its authors, and squaring keeps what ReLU would have cut.

    Args:
        backbone: ``resnet50`` or ``resnet101``.
        weights: file with torchvision's weights of that ResNet (its classifier is left out); None: random.
        output_stride: pixels of the image a pixel of the features, 8 or 16; at 8 the rates of ASPP double.
        dropout: probability in ASPP, 0..1.

    Raises:
        UserError: a backbone or stride that is not possible, or weights that do not fit.

    Source: Chen et al. 2017, arXiv 1706.05587; momentum 0.01 of the backbone's norms is DKD's.
    """

    def __init__(
        self,
        backbone: str = "resnet101",
        *,
        weights: str | Path | None = None,
        output_stride: int = 16,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if output_stride not in _DILATED:
            raise UserError(f"network.output_stride={output_stride}; expected 8 or 16")
        if not 0 <= dropout < 1:
            raise UserError(f"network.dropout={dropout}; expected 0 <= dropout < 1")
        self.backbone = _backbone(backbone, output_stride, weights)
        self.stride = output_stride
        self.out_channels = 256
        factor = 16 // output_stride
        self.neck = ASPP(2048, 256, (6 * factor, 12 * factor, 18 * factor), dropout)

    def forward(self, x: Tensor) -> Features:
        """(B, 3, H, W) -> features (B, 256, H / stride, W / stride), four stages."""
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        stages = []
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            stages.append(_without_last_relu(stage, x))
            x = F.relu(stages[-1])
        return Features(self.neck(x), stages)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """The ResNet's."""
        return self.backbone.parameters()

    def neck_parameters(self) -> Iterator[nn.Parameter]:
        """ASPP's, with its last convolution."""
        return self.neck.parameters()


def _backbone(name: str, output_stride: int, weights: str | Path | None) -> resnet.ResNet:
    if name in ("resnet18", "resnet34"):
        raise UserError(
            f"network deeplabv3_{name}: torchvision's BasicBlock cannot be dilated, so {name} has no output stride "
            f"{output_stride}; use deeplabv3_resnet50, or timm:{name}"
        )
    if name not in BACKBONES:
        raise UserError(f"network deeplabv3_{name}; known: {', '.join(f'deeplabv3_{one}' for one in BACKBONES)}")
    build = {"resnet50": resnet.resnet50, "resnet101": resnet.resnet101}[name]
    net: resnet.ResNet = build(weights=None, replace_stride_with_dilation=list(_DILATED[output_stride]))
    del net.fc, net.avgpool
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = _BACKBONE_MOMENTUM
    if weights is not None:
        fill(net, load_tensors(weights), weights, f"torchvision's {name}", skip=("fc.",))
    return net


def _without_last_relu(stage: nn.Module, x: Tensor) -> Tensor:
    """A stage of bottleneck blocks without the ReLU at its end."""
    assert isinstance(stage, nn.Sequential)
    x = stage[:-1](x)
    block = stage[-1]
    assert isinstance(block, resnet.Bottleneck)
    out = block.relu(block.bn1(block.conv1(x)))
    out = block.relu(block.bn2(block.conv2(out)))
    out = block.bn3(block.conv3(out))
    # The last block of a stage never changes size: it adds its input as it is.
    return out + x
