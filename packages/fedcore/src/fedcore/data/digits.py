"""scikit-learn's handwritten digits: real pictures that ship with the package."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from polymodal.errors import UserError
from polymodal.seeding import numpy_rng

from fedcore.data.array_type import ArrayData
from fedcore.data.base import FedData
from fedcore.data.images import quarter_turns

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Digits"]

_TOTAL = 1797


@dataclass
class Digits(FedData):
    """1,797 grey 8x8 digits (0..1), 360 of them for testing, chosen at random once and for all.

    Args:
        root: not used; the pictures come with scikit-learn.
        test_samples: pictures of the test split (the published small experiments: 360).
        split_seed: which pictures those are; the seed of a run does not change the data.
        rotate: degrees that every picture is turned to the left: 0, 90, 180 or 270. A base that was trained on upright
            pictures then has something to adapt to.
    """

    test_samples: int = 360
    split_seed: int = 0
    rotate: int = 0

    name: ClassVar[str] = "digits"
    remedy: ClassVar[str] = "choose fewer test pictures (--data.test_samples)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.test_samples < _TOTAL:
            raise UserError(f"test_samples={self.test_samples}; expected 1..{_TOTAL - 1}, the digits are {_TOTAL}")
        quarter_turns(self.rotate)

    def class_names(self) -> list[str]:
        """0 to 9."""
        return [str(digit) for digit in range(10)]

    def read_split(self, split: str) -> ArrayData:
        """(N, 1, 8, 8) float32 in 0..1."""
        import torch

        from fedcore.data.arrays import ArrayData

        images, labels = _stored()
        order = numpy_rng(self.split_seed, "digits").permutation(_TOTAL)
        chosen = sorted(order[: self.test_samples] if split == "test" else order[self.test_samples :])
        inputs = torch.from_numpy(images[chosen]).float().div_(16).unsqueeze(1)
        inputs = inputs.rot90(quarter_turns(self.rotate), (2, 3)).contiguous()
        return ArrayData(inputs, torch.from_numpy(labels[chosen]).long())


def _stored() -> tuple[np.ndarray, np.ndarray]:
    """Pictures (1797, 8, 8), 0..16, and labels.

    Read from the file itself where it is in its place: importing scikit-learn takes seconds.
    """
    import numpy as np

    found = importlib.util.find_spec("sklearn")
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            table = np.loadtxt(gzip.decompress(path.read_bytes()).decode().splitlines(), delimiter=",", dtype=np.int64)
            if table.shape == (_TOTAL, 65):
                return table[:, :64].reshape(-1, 8, 8), table[:, 64]
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target
