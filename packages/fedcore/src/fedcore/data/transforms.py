"""What happens to a batch of stored inputs: random crops and flips for training, normalisation always."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CropFlip", "Normalise", "Trim"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class CropFlip:
    """A crop at a random place of the picture padded with black, and a horizontal flip, each picture its own.

    Args:
        padding: pixels added on each side before cropping back to the picture's size.
        flip: probability of a flip, 0..1.
    """

    def __init__(self, padding: int = 4, flip: float = 0.5) -> None:
        self.padding, self.flip = padding, flip

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C, H, W) of any type -> the same shape and type; draws are made on the CPU, whatever the device."""
        count, channels, height, width = images.shape
        places = torch.randint(0, 2 * self.padding + 1, (2, count, 1), generator=generator)
        rows = places[0] + torch.arange(height)
        cols = places[1] + torch.arange(width)
        flipped = torch.rand((count, 1), generator=generator) < self.flip
        cols = torch.where(flipped, cols.flip(1), cols)
        padded = F.pad(images, (self.padding,) * 4)
        # One gather over pixels: five times as fast as indexing by rows and columns.
        pixels = (rows[:, :, None] * padded.shape[3] + cols[:, None, :]).view(count, 1, -1).to(images.device)
        return padded.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view(images.shape)


class Normalise:
    """uint8 pictures to floats: ``(x / 255 - mean) / std`` by channel, after an optional resize.

    Args:
        mean: by channel, in units of the full brightness.
        std: by channel.
        size: side of a central crop of the picture whose shorter side was resized to ``size * 256 / 224``, as for
            pretrained transformers; 0: the picture as it is.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], size: int = 0) -> None:
        self.size = size
        # (x / 255 - mean) / std as one multiplication and one addition
        self._scale = torch.tensor([1 / (255 * s) for s in std]).view(-1, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> float32; one grey channel is repeated where three are expected."""
        pixels = images.float()
        if self.size:
            pixels = _resize_crop(pixels, self.size)
        if self._scale.device != images.device:
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        return pixels * self._scale + self._shift

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one picture after it."""
        channels, height, width = shape
        height, width = (self.size, self.size) if self.size else (height, width)
        return max(channels, len(self._scale)), height, width


class Trim:
    """Cut token ids to the longest text of the batch; padding is 0 and stands at the end."""

    def __call__(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, longest), at least one column."""
        used = (ids != 0).any(dim=0).nonzero()
        return ids[:, : int(used[-1]) + 1 if len(used) else 1]


def _resize_crop(pixels: Tensor, size: int) -> Tensor:
    height, width = pixels.shape[-2:]
    short, resized = min(height, width), round(size * 256 / 224)
    shape = [resized * height // short, resized * width // short]  # rounded down, as torchvision does
    # Antialiased, as Pillow does; only shrinking needs it.
    pixels = F.interpolate(pixels, size=shape, mode="bilinear", align_corners=False, antialias=resized < short)
    top, left = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    return pixels[..., top : top + size, left : left + size]
