"""Pictures as the network takes them: one random draw for a picture and all maps that belong to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

__all__ = ["MEAN", "STD", "Draw", "augment", "draw_augmentation", "draw_crop", "fit", "normalise", "to_tensors"]

MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean of red, green and blue, 0..1."""
STD = (0.229, 0.224, 0.225)
"""ImageNet's standard deviation of red, green and blue, 0..1."""
_TRIES = 10
_BILINEAR = F.InterpolationMode.BILINEAR


@dataclass(frozen=True)
class Draw:
    """What augmentation does to one picture.

    Args:
        box: (top, left, height, width) of the crop, pixels.
        flip: mirror it left to right.
    """

    box: tuple[int, int, int, int]
    flip: bool = False


def draw_crop(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Box of a random resized crop, draw by draw as torchvision's ``RandomResizedCrop`` makes it.

    A crop that does not fit is drawn again, ten times in all; then the largest central crop with an allowed aspect is
    taken, which is the whole picture unless that is longer than ``ratio`` allows.

    Args:
        height: of the picture, pixels.
        width: of the picture, pixels.
        scale: smallest and largest share of the picture's area; shares above 1 seldom or never fit.
        ratio: smallest and largest width by height.
        generator: CPU generator of the picture.

    Returns:
        (top, left, height, width) in pixels.

    Source: torchvision.transforms.v2.RandomResizedCrop; with scale (0.5, 2) the crop of Yin et al. 2025,
        arXiv 2503.22136.
    """
    lower, upper = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        area = height * width * torch.empty(1).uniform_(scale[0], scale[1], generator=generator).item()
        aspect = torch.exp(torch.empty(1).uniform_(lower, upper, generator=generator)).item()
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            top = int(torch.randint(0, height - high + 1, (1,), generator=generator).item())
            left = int(torch.randint(0, width - wide + 1, (1,), generator=generator).item())
            return top, left, high, wide
    high, wide = height, width
    if width / height < min(ratio):
        high = round(width / min(ratio))
    elif width / height > max(ratio):
        wide = round(height * max(ratio))
    return (height - high) // 2, (width - wide) // 2, high, wide


def draw_augmentation(
    height: int,
    width: int,
    generator: torch.Generator,
    *,
    scale: Sequence[float] = (0.5, 2.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> Draw:
    """The draw of one picture: :func:`draw_crop`, then whether it is mirrored.

    Args:
        height: of the picture, pixels.
        width: of the picture, pixels.
        generator: CPU generator of the picture.
        scale: share of the picture's area.
        ratio: width by height.
        flip: probability of the mirror image, 0..1.
    """
    box = draw_crop(height, width, scale, ratio, generator)
    return Draw(box, bool(torch.rand(1, generator=generator).item() < flip))


def to_tensors(image: np.ndarray, maps: Sequence[np.ndarray]) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Decoded arrays as torchvision's types, without a copy where the arrays can be written to.

    Args:
        image: (H, W, 3) uint8.
        maps: n arrays (H, W) of uint8 or bool: labels, saliency, foreground.

    Returns:
        Image (3, H, W) uint8 and maps (n, H, W) uint8.
    """
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)
    planes = [torch.from_numpy(np.require(plane, np.uint8, ["C", "W"])) for plane in maps]
    return tv_tensors.Image(pixels), tv_tensors.Mask(planes[0][None] if len(planes) == 1 else torch.stack(planes))


def augment(image: tv_tensors.Image, maps: tv_tensors.Mask, draw: Draw, size: int) -> tuple[Tensor, Tensor]:
    """Crop, resize and mirror a picture (bilinear) and its maps (nearest) alike.

    Args:
        image: (3, H, W) uint8.
        maps: (n, H, W) uint8.
        draw: see :func:`draw_augmentation`.
        size: side of the result, pixels.

    Returns:
        (3, size, size) and (n, size, size) uint8.
    """
    found = []
    for tensor in (image, maps):
        out = F.resized_crop(tensor, *draw.box, size=[size, size], interpolation=_BILINEAR, antialias=True)
        found.append(F.horizontal_flip(out) if draw.flip else out)
    return found[0].as_subclass(Tensor), found[1].as_subclass(Tensor)


def fit(image: tv_tensors.Image, maps: tv_tensors.Mask, size: int) -> tuple[Tensor, Tensor]:
    """The evaluation crop: shorter side to ``size``, then the centre; maps (nearest) like the picture (bilinear).

    Args:
        image: (3, H, W) uint8.
        maps: (n, H, W) uint8.
        size: side of the result, pixels.

    Returns:
        (3, size, size) and (n, size, size) uint8.
    """
    found = []
    for tensor in (image, maps):
        out = F.resize(tensor, [size], interpolation=_BILINEAR, antialias=True)
        found.append(F.center_crop(out, [size, size]))
    return found[0].as_subclass(Tensor), found[1].as_subclass(Tensor)


_SHIFT = torch.tensor(MEAN).view(3, 1, 1) * 255
_FACTOR = 1 / (torch.tensor(STD).view(3, 1, 1) * 255)


def normalise(image: Tensor) -> Tensor:
    """Bytes to what networks pre-trained on ImageNet expect: mean 0, deviation 1 by channel.

    Args:
        image: (..., 3, H, W) uint8.

    Returns:
        Same shape, float32.
    """
    return image.float().sub_(_SHIFT).mul_(_FACTOR).contiguous()
