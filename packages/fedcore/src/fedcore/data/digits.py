"""scikit-learn's handwritten digits: real pictures that ship with the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from polymodal.errors import UserError
from polymodal.seeding import numpy_rng

from fedcore.data.array_type import ArrayData
from fedcore.data.base import FedData

__all__ = ["Digits"]

_TOTAL = 1797


@dataclass
class Digits(FedData):
    """1,797 grey 8x8 digits (0..1), 360 of them for testing, chosen at random once and for all.

    Args:
        root: not used; the pictures come with scikit-learn.
        test_samples: pictures of the test split (the published small experiments: 360).
        split_seed: which pictures those are; the seed of a run does not change the data.
    """

    test_samples: int = 360
    split_seed: int = 0

    name: ClassVar[str] = "digits"
    remedy: ClassVar[str] = "choose fewer test pictures (--data.test_samples)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.test_samples < _TOTAL:
            raise UserError(f"test_samples={self.test_samples}; expected 1..{_TOTAL - 1}, the digits are {_TOTAL}")

    def class_names(self) -> list[str]:
        """0 to 9."""
        return [str(digit) for digit in range(10)]

    def read_split(self, split: str) -> ArrayData:
        """(N, 1, 8, 8) float32 in 0..1."""
        import torch
        from sklearn.datasets import load_digits

        from fedcore.data.arrays import ArrayData

        digits = load_digits()
        order = numpy_rng(self.split_seed, "digits").permutation(_TOTAL)
        chosen = sorted(order[: self.test_samples] if split == "test" else order[self.test_samples :])
        inputs = torch.from_numpy(digits.images[chosen]).float().div_(16).unsqueeze(1)
        return ArrayData(inputs, torch.from_numpy(digits.target[chosen]).long())
