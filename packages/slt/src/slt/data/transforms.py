"""Frames as the model takes them: one geometric draw per clip in training, a centre crop in evaluation; no flip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

__all__ = ["ClipTransform", "Draw", "draw_augmentation"]

_ROTATE = 30.0
_SCALE = 0.2
_SHIFT = 10
_SHARE = 0.5


@dataclass(frozen=True)
class Draw:
    """What one clip's augmentation does to each of its frames.

    Args:
        angle: rotation in degrees, counter-clockwise; 0 is none.
        scale: factor on height and width.
        shift: (x, y) in pixels.
        crop: (top, left) as shares of the room that the crop has, 0..1.
    """

    angle: float = 0.0
    scale: float = 1.0
    shift: tuple[int, int] = (0, 0)
    crop: tuple[float, float] = (0.5, 0.5)


def draw_augmentation(generator: torch.Generator) -> Draw:
    """Rotation within 30 degrees, resize within 20 %, shift within 10 pixels, each with probability .5; a random crop.

    Args:
        generator: CPU generator of the clip.

    Source:
        SSL-SSAW (arXiv 2509.14036), our reading, section 3.7; the augmentation of GFSLT-VLP.
    """
    u = torch.rand(9, generator=generator, dtype=torch.float64).tolist()
    shift = (round((2 * u[5] - 1) * _SHIFT), round((2 * u[6] - 1) * _SHIFT))
    return Draw(
        angle=(2 * u[1] - 1) * _ROTATE if u[0] < _SHARE else 0.0,
        scale=1 + (2 * u[3] - 1) * _SCALE if u[2] < _SHARE else 1.0,
        shift=shift if u[4] < _SHARE else (0, 0),
        crop=(u[7], u[8]),
    )


class ClipTransform:
    """Decoded frames to what the model takes; all frames of a clip alike.

    Args:
        size: height and width of the result.
        resize: height and width before the crop; None: straight to ``size``, no crop.
    """

    def __init__(self, size: int, resize: int | None = None) -> None:
        self.size = size
        self.resize = size if resize is None else resize

    def __call__(self, frames: np.ndarray, draw: Draw | None = None) -> Tensor:
        """Transform one clip.

        Args:
            frames: ``(T, H, W, 3)`` uint8.
            draw: augmentation; None is evaluation (centre crop).

        Returns:
            ``(T, 3, size, size)`` uint8.
        """
        clip = torch.from_numpy(np.require(frames, requirements=["C", "W"])).permute(0, 3, 1, 2)
        draw = Draw() if draw is None else draw
        if draw.angle:
            clip = F.rotate(clip, draw.angle, interpolation=F.InterpolationMode.BILINEAR)
        if draw.scale != 1:
            # As in the code we follow: the later resize undoes the change of size, what stays is a change of sharpness
            # and of how far the shift reaches.
            clip = _resize(clip, round(clip.shape[2] * draw.scale), round(clip.shape[3] * draw.scale))
        if draw.shift != (0, 0):
            clip = F.affine(clip, angle=0.0, translate=list(draw.shift), scale=1.0, shear=[0.0, 0.0])
        clip = _resize(clip, self.resize, self.resize)
        room = self.resize - self.size
        top, left = (min(room, int(share * (room + 1))) for share in draw.crop)
        return clip[:, :, top : top + self.size, left : left + self.size].contiguous()


def _resize(clip: Tensor, height: int, width: int) -> Tensor:
    if clip.shape[2:] == (height, width):
        return clip
    return F.resize(clip, [max(1, height), max(1, width)], antialias=True)
