"""A small convolutional network for pictures of about 64 pixels on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from polymodal.errors import UserError
from torch import Tensor, nn

from css.models.base import FeatureExtractor, Features
from css.models.heads import kaiming

__all__ = ["TinyExtractor"]


def _conv(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class TinyExtractor(FeatureExtractor):
    """Six 3x3 convolutions with batch normalisation and ReLU in three stages of two, the last one dilated.

    Args:
        width: channels of the first stage; the others have twice as many.
        stride: pixels of the image a pixel of the features, 2 or 4.

    Raises:
        UserError: a width or stride that is not possible.
    """

    def __init__(self, width: int = 20, stride: int = 2) -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"network.width={width}; expected at least 1")
        if stride not in (2, 4):
            raise UserError(f"stride={stride}; the tiny network has 2 or 4")
        self.stride = stride
        self.out_channels = 2 * width
        wide = 2 * width
        self.blocks = nn.ModuleList(
            [
                nn.ModuleList([_conv(3, width, stride=2), _conv(width, width)]),
                nn.ModuleList([_conv(width, wide, stride=stride // 2), _conv(wide, wide)]),
                nn.ModuleList([_conv(wide, wide, dilation=2), _conv(wide, wide, dilation=4)]),
            ]
        )
        kaiming(self)

    def forward(self, x: Tensor) -> Features:
        """(B, 3, H, W) -> features (B, 2 width, H / stride, W / stride), three stages before their last ReLU."""
        stages = []
        for block in self.blocks:
            assert isinstance(block, nn.ModuleList)
            first, second = block
            stages.append(second(F.relu(first(x))))
            x = F.relu(stages[-1])
        return Features(x, stages)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """All of them."""
        return self.parameters()

    def neck_parameters(self) -> Iterator[nn.Parameter]:
        """None."""
        return iter(())
