"""What the readers of users' own files share. No torch: it is part of the CLI."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.errors import UserError
from polymodal.paths import require_files
from polymodal.seeding import numpy_rng

from fedcore.data.base import FedData

if TYPE_CHECKING:
    import numpy as np

__all__ = ["check_share", "file_of", "held_out"]


def file_of(reader: FedData) -> Path:
    """The file that ``root`` names.

    Raises:
        UserError: none given, or it is missing.
    """
    if reader.root is None:
        raise UserError(f"{reader.name}: no file; {reader.remedy} (--data.root FILE)")
    if reader.root.is_dir():
        raise UserError(f"{reader.name}: {reader.root} is a folder; {reader.remedy}")
    return require_files(reader.root.parent, [reader.root.name], f"{reader.name} file", reader.remedy)[0]


def held_out(labels: np.ndarray, share: float, seed: int, split: str, regression: bool) -> np.ndarray:
    """Rising indices of a split; the same share of each class is for testing."""
    import numpy as np

    rng = numpy_rng(seed, "own data")
    classes = np.zeros(len(labels), dtype=np.int64) if regression else np.unique(labels, return_inverse=True)[1]
    tested = np.zeros(len(labels), dtype=bool)
    for number in range(int(classes.max()) + 1 if len(classes) else 0):
        members = rng.permutation(np.flatnonzero(classes == number))
        tested[members[: round(share * len(members))]] = True
    return np.flatnonzero(tested if split == "test" else ~tested)


def check_share(share: float) -> None:
    """UserError unless a share of test samples is between 0 and 1."""
    if not 0 < share < 1:
        raise UserError(f"test_share={share}; expected 0 < test_share < 1")
