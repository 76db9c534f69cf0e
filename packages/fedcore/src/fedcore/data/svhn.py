"""Street View House Numbers, the cropped digits, in their official MATLAB files."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

from polymodal.errors import UserError
from polymodal.paths import require_files

from fedcore.data.array_type import ArrayData
from fedcore.data.images import ImageData

__all__ = ["SVHN"]

_FAULTS = (OSError, ValueError, TypeError, KeyError, IndexError, NotImplementedError, zlib.error)


@dataclass
class SVHN(ImageData):
    """SVHN: 73,257 + 26,032 digits of house numbers, 3x32x32.

    ``<root>/{train,test}_32x32.mat``; ``extra_32x32.mat`` is not read. The label 10 of the files is the digit 0.

    Args:
        root: folder with the two files.
        augment: random crop (padding 4) and flip in training; off by default: mirrored digits are none.
        image_size: as for all pictures.

    Source: Netzer et al., Reading Digits in Natural Images, 2011.
    """

    augment: bool = False

    name: ClassVar[str] = "svhn"
    remedy: ClassVar[str] = "give the folder with train_32x32.mat and test_32x32.mat"
    mean: ClassVar[tuple[float, ...]] = (0.4377, 0.4438, 0.4728)
    std: ClassVar[tuple[float, ...]] = (0.1980, 0.2010, 0.1970)

    def class_names(self) -> list[str]:
        """The digits."""
        return [str(digit) for digit in range(10)]

    def read_split(self, split: str) -> ArrayData:
        """(N, 3, 32, 32) uint8.

        Raises:
            UserError: a missing or broken file, or one with other arrays.
        """
        import numpy as np
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError

        (path,) = require_files(self.home(), [f"{split}_32x32.mat"], self.name, self.remedy)
        try:
            found = loadmat(path, variable_names=["X", "y"])
            pixels, labels = np.asarray(found["X"]), np.asarray(found["y"]).reshape(-1)
        except (*_FAULTS, MatReadError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{self.name}: {path} cannot be read ({reason}); copy it again") from error
        if pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3) or pixels.shape[3] != len(labels):
            raise UserError(
                f"{self.name}: {path} holds X {pixels.shape} and {len(labels)} labels; expected (32, 32, 3, N) and N:"
                " is it the set of cropped digits?"
            )
        if pixels.dtype != np.uint8 or not len(labels) or not 1 <= labels.min() <= labels.max() <= 10:
            raise UserError(f"{self.name}: {path} has other numbers than bytes and labels 1..10; copy it again")
        pictures = np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))
        return self.pictures(pictures, labels.astype(np.int64) % 10, split)
