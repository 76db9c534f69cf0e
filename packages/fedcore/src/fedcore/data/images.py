"""What readers of pictures share: augmentation and normalisation. No torch at import: it is part of the CLI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polymodal.errors import UserError

from fedcore.data.array_type import ArrayData
from fedcore.data.base import FedData

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CIFAR_MEAN", "CIFAR_STD", "ImageData", "quarter_turns"]

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""fedswa.md section 4; used for both CIFAR sets."""


@dataclass
class ImageData(FedData):
    """Base class: a subclass reads uint8 pictures and classes.

    Args:
        root: folder of the data set in its official layout.
        augment: random crop of the padded picture and random flip in training.
        image_size: resize by 256/224 of this, cut the centre of this size, ImageNet statistics, three channels: for
            pretrained transformers (224); 0: pictures as they are, with the statistics of the data set.
    """

    augment: bool = True
    image_size: int = 0

    mean: ClassVar[tuple[float, ...]] = ()
    std: ClassVar[tuple[float, ...]] = ()
    padding: ClassVar[int] = 4
    """pixels around a training picture before its random crop"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < 0:
            raise UserError(f"image_size={self.image_size}; expected 0 (as stored) or a side in pixels, e.g. 224")

    def pictures(self, inputs: np.ndarray, targets: np.ndarray, split: str) -> ArrayData:
        """Samples of a split.

        Args:
            inputs: (N, C, H, W) uint8.
            targets: (N,) class numbers.
            split: only ``train`` is augmented.
        """
        import torch

        from fedcore.data.arrays import ArrayData
        from fedcore.data.transforms import IMAGENET_MEAN, IMAGENET_STD, CropFlip, Normalise

        resized = self.image_size > 0
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if resized else (self.mean, self.std)
        return ArrayData(
            torch.from_numpy(inputs),
            torch.from_numpy(targets).long(),
            augment=CropFlip(self.padding) if self.augment and split == "train" else None,
            transform=Normalise(mean, std, self.image_size),
        )


def quarter_turns(degrees: int) -> int:
    """How many times a picture is turned to the left by 90 degrees.

    Raises:
        UserError: other than 0, 90, 180 or 270 degrees.
    """
    if degrees not in (0, 90, 180, 270):
        raise UserError(f"rotate={degrees}; expected 0 (as stored), 90, 180 or 270 degrees to the left")
    return degrees // 90
