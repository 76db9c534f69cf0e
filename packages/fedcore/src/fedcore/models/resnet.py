"""Residual networks for small pictures: 3x3 stem, no pooling before the stages, GroupNorm with two groups."""

from __future__ import annotations

from typing import Literal

from polymodal.errors import UserError
from torch import Tensor, nn

from fedcore.models.lenet import picture_shape

__all__ = ["ResNet", "resnet10_gn", "resnet18_gn", "resnet34_gn"]

Norm = Literal["gn", "bn"]


class ResNet(nn.Module):
    """Four stages of basic blocks with 64, 128, 256 and 512 channels, global mean, one linear layer.

    Args:
        num_classes: outputs.
        input_shape: (channels, height, width).
        blocks: basic blocks of each stage.
        norm: ``gn`` GroupNorm; ``bn`` BatchNorm in the blocks, the stem stays GroupNorm, as in the authors' code.
        groups: groups of GroupNorm.
        width: channels of the first stage.

    Source: He et al. 2016 (basic blocks); stem and norms from fedswa.md section 3.5.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input_shape: tuple[int, ...],
        blocks: tuple[int, int, int, int],
        norm: Norm = "gn",
        groups: int = 2,
        width: int = 64,
    ) -> None:
        super().__init__()
        channels, _, _ = picture_shape("resnet", input_shape)
        if norm not in ("gn", "bn"):
            raise UserError(f"resnet: norm={norm!r}; expected gn (GroupNorm) or bn (BatchNorm)")
        if groups < 1 or width < 1 or width % groups:
            raise UserError(f"resnet: {width} channels in {groups} groups; expected a divisor of the width")
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, width)
        self.relu = nn.ReLU()
        stages, previous = [], width
        for number, count in enumerate(blocks):
            wide = width * 2**number
            strides = [1 if number == 0 else 2] + [1] * (count - 1)
            stages.append(
                nn.Sequential(
                    *(
                        _Block(previous if place == 0 else wide, wide, stride, norm, groups)
                        for place, stride in enumerate(strides)
                    )
                )
            )
            previous = wide
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(previous, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> logits (B, num_classes)."""
        features = self.stages(self.relu(self.norm1(self.conv1(images))))
        logits: Tensor = self.fc(features.mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    """Two 3x3 convolutions with norms; the input is added, through a 1x1 convolution where its shape differs."""

    def __init__(self, channels: int, wide: int, stride: int, norm: Norm, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wide, 3, stride, 1, bias=False)
        self.norm1 = _norm(norm, groups, wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.norm2 = _norm(norm, groups, wide)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != wide:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, wide, 1, stride, bias=False), _norm(norm, groups, wide))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu(self.norm1(self.conv1(x)))
        result: Tensor = self.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))
        return result


def _norm(norm: Norm, groups: int, channels: int) -> nn.Module:
    return nn.GroupNorm(groups, channels) if norm == "gn" else nn.BatchNorm2d(channels)


def resnet10_gn(
    *, num_classes: int, input_shape: tuple[int, ...], norm: Norm = "gn", groups: int = 2, width: int = 64
) -> ResNet:
    """One block a stage; options as for ``ResNet``."""
    return ResNet(
        num_classes=num_classes, input_shape=input_shape, blocks=(1, 1, 1, 1), norm=norm, groups=groups, width=width
    )


def resnet18_gn(
    *, num_classes: int, input_shape: tuple[int, ...], norm: Norm = "gn", groups: int = 2, width: int = 64
) -> ResNet:
    """Two blocks a stage; options as for ``ResNet``."""
    return ResNet(
        num_classes=num_classes, input_shape=input_shape, blocks=(2, 2, 2, 2), norm=norm, groups=groups, width=width
    )


def resnet34_gn(
    *, num_classes: int, input_shape: tuple[int, ...], norm: Norm = "gn", groups: int = 2, width: int = 64
) -> ResNet:
    """3, 4, 6 and 3 blocks; options as for ``ResNet``."""
    return ResNet(
        num_classes=num_classes, input_shape=input_shape, blocks=(3, 4, 6, 3), norm=norm, groups=groups, width=width
    )
