"""MNIST in its official idx files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedcore.data.base import FedData
from fedcore.data.fashion import FashionMNIST

__all__ = ["MNIST"]


@dataclass
class MNIST(FashionMNIST):
    """MNIST: 60,000 + 10,000 grey 28x28 handwritten digits.

    ``<root>/[MNIST/raw/]{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz``, or the same unpacked.

    Args:
        root: folder with the four files.
        augment: random crop and flip in training; off by default: mirrored digits are none.
        image_size: as for all pictures; the grey channel is repeated three times then.
        rotate: degrees that every picture is turned to the left: 0, 90, 180 or 270.

    Source: LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998.
    """

    name: ClassVar[str] = "mnist"
    remedy: ClassVar[str] = "give the folder with its four idx files"
    mean: ClassVar[tuple[float, ...]] = (0.1307,)
    std: ClassVar[tuple[float, ...]] = (0.3081,)

    def class_names(self) -> list[str]:
        """The digits."""
        return [str(digit) for digit in range(10)]

    def home(self) -> Path:
        """The folder with the files: the root, or ``MNIST/raw`` in it."""
        root = FedData.home(self)  # not that of Debian's package
        inside = root / "MNIST" / "raw"
        return inside if inside.is_dir() else root
