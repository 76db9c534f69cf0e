"""STL-10 in its official binary files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from polymodal.errors import UserError
from polymodal.paths import require_files

from fedcore.data.array_type import ArrayData
from fedcore.data.images import ImageData

__all__ = ["STL10"]

_SHAPE = (3, 96, 96)
_SIZE = 3 * 96 * 96


@dataclass
class STL10(ImageData):
    """STL-10: 5,000 + 8,000 pictures of ten classes, 3x96x96; random crop (padding 12) and flip in training.

    ``<root>/[stl10_binary/]{train,test}_{X,y}.bin``; the unlabelled pictures and the folds are not read.

    Source: Coates, Ng and Lee, An Analysis of Single-Layer Networks, AISTATS 2011.
    """

    name: ClassVar[str] = "stl10"
    remedy: ClassVar[str] = "unpack stl10_binary.tar.gz and give the folder stl10_binary"
    mean: ClassVar[tuple[float, ...]] = (0.4467, 0.4398, 0.4066)
    std: ClassVar[tuple[float, ...]] = (0.2603, 0.2566, 0.2713)
    padding: ClassVar[int] = 12

    def class_names(self) -> list[str]:
        """The ten classes in the order of their numbers."""
        return ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]

    def home(self) -> Path:
        """The folder with the files: the root, or the official folder in it."""
        root = super().home()
        inside = root / "stl10_binary"
        return inside if inside.is_dir() and not (root / "train_X.bin").is_file() else root

    def read_split(self, split: str) -> ArrayData:
        """(N, 3, 96, 96) uint8.

        Raises:
            UserError: a missing file, one of another size, or a label outside 1..10.
        """
        import numpy as np

        paths = require_files(self.home(), [f"{split}_X.bin", f"{split}_y.bin"], self.name, self.remedy)
        sizes = [path.stat().st_size for path in paths]
        if not sizes[0] or sizes[0] != sizes[1] * _SIZE:
            raise UserError(
                f"{self.name}: {paths[0]} has {sizes[0]} bytes, {paths[1].name} {sizes[1]}; expected {_SIZE} and 1 a"
                " picture: unpack both again"
            )
        pixels, labels = (np.fromfile(path, dtype=np.uint8) for path in paths)
        if not 1 <= labels.min() <= labels.max() <= 10:
            raise UserError(f"{self.name}: {paths[1]} has labels {labels.min()}..{labels.max()}; expected 1..10")
        # Each picture is stored column by column.
        pictures = np.ascontiguousarray(pixels.reshape(-1, *_SHAPE).transpose(0, 1, 3, 2))
        return self.pictures(pictures, labels.astype(np.int64) - 1, split)
