"""LeNet-5 as in the published comparisons, and the benchmark's network, which is the same."""

from __future__ import annotations

from polymodal.errors import UserError
from torch import nn

__all__ = ["LeNet5"]

_SMALLEST = 16


class LeNet5(nn.Sequential):
    """conv5x5-64, pool, conv5x5-64, pool, fully connected 384-192-C, ReLU between.

    On 3x32x32 pictures the first fully connected layer has 1600 inputs. Convolutions are not padded.

    Args:
        num_classes: C.
        input_shape: (channels, height, width), each side at least 16.
        width: channels of both convolutions.

    Raises:
        UserError: no picture, or one too small for two unpadded convolutions.

    Source: fedswa.md section 3.5.
    """

    def __init__(self, *, num_classes: int, input_shape: tuple[int, ...], width: int = 64) -> None:
        channels, height, rows = picture_shape("lenet5", input_shape, _SMALLEST)
        if width < 1:
            raise UserError(f"lenet5: width={width}; expected at least 1 channel")
        # each convolution takes 4 pixels off a side, each pooling half
        high, wide = (((side - 4) // 2 - 4) // 2 for side in (height, rows))
        super().__init__(
            nn.Conv2d(channels, width, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(width * high * wide, 384),
            nn.ReLU(),
            nn.Linear(384, 192),
            nn.ReLU(),
            nn.Linear(192, num_classes),
        )


def picture_shape(model: str, shape: tuple[int, ...], smallest: int = 1) -> tuple[int, int, int]:
    """Channels, height and width.

    Args:
        model: its name, for the message.
        shape: of one input.
        smallest: least side.

    Raises:
        UserError: another number of dimensions, or too small.
    """
    if len(shape) != 3 or min(shape[1:]) < smallest:
        size = f"of at least {smallest}x{smallest} pixels" if smallest > 1 else ""
        raise UserError(f"model {model} takes pictures (channels, height, width) {size}; inputs here are {shape}")
    return shape[0], shape[1], shape[2]
