"""What every reader shares: root folder, splits, classes, fingerprint. No torch: it is part of the CLI."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from polymodal.errors import UserError
from polymodal.paths import require_dir

from fedcore.data.array_type import ArrayData

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SPLITS", "FedData"]

SPLITS = ("train", "test")


@dataclass
class FedData:
    """Base class of the readers; a subclass fills in ``class_names`` and ``read_split``.

    Validation samples are cut from the training split by whoever trains, never from the test split.

    Args:
        root: folder of the data set in its official layout.
    """

    root: Path | None = None

    name: ClassVar[str] = ""
    remedy: ClassVar[str] = "give the folder of the data set"
    """what to do where the root is missing, for messages"""
    may_lack_classes: ClassVar[bool] = False
    """whether the official files leave classes without training samples"""

    def __post_init__(self) -> None:
        if self.root is not None:
            self.root = Path(self.root).expanduser()

    # ------------------------------------------------------------------ what a subclass fills in

    def class_names(self) -> list[str]:
        """Names of the classes 0..C-1; empty for a regression."""
        raise NotImplementedError(f"{type(self).__name__}.class_names")

    def read_split(self, split: str) -> ArrayData:
        """All samples of a split in file order."""
        raise NotImplementedError(f"{type(self).__name__}.read_split")

    # ------------------------------------------------------------------ shared behaviour

    @property
    def splits(self) -> tuple[str, ...]:
        """Names that ``load`` takes; some readers have a second test split."""
        return SPLITS

    @property
    def regression(self) -> bool:
        """Whether targets are numbers instead of classes; such models have one output and a squared error."""
        return False

    @property
    def num_classes(self) -> int:
        """C, outputs of a model: classes, or 1 for a regression."""
        return 1 if self.regression else len(self.class_names())

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is reported of a model, names in ``fedcore.data.metrics``."""
        return ("accuracy",)

    @property
    def vocabulary(self) -> int:
        """Number of token ids of texts, padding 0 included; 0 where inputs are no texts."""
        return 0

    def fit_to_model(self, model: str) -> None:
        """Adapt options that were left open to the model's name; call it before anything is read."""

    def home(self) -> Path:
        """The root folder.

        Raises:
            UserError: no root given, or it is no folder.
        """
        if self.root is None:
            raise UserError(f"{self.name}: no root folder; {self.remedy} (--data.root DIR)")
        return require_dir(self.root, f"{self.name} root", self.remedy)

    def load(self, split: str) -> ArrayData:
        """Samples of a split, read once.

        Raises:
            UserError: unknown split, missing or broken files.
        """
        if split not in self.splits:
            raise UserError(f"{self.name}: split {split!r}; expected one of {', '.join(self.splits)}")
        known: dict[str, ArrayData] = self.__dict__.setdefault("_loaded", {})
        if split not in known:
            known[split] = self.read_split(split)
        return known[split]

    def partition_labels(self, split: str = "train") -> np.ndarray:
        """Labels (N,) int64 that label-skewed partitions go by; numbers of a regression are cut into five classes."""
        targets: np.ndarray = self.load(split).targets.numpy()
        if not self.regression:
            return targets
        from fedcore.partition import bin_targets

        return bin_targets(targets)

    def check(self) -> None:
        """Whether the layout is there and no split is empty.

        Raises:
            UserError: what is missing first.
        """
        for split in self.splits:
            if not len(self.load(split)):
                raise UserError(f"{self.name}: the {split} split is empty; {self.remedy}")

    def fingerprint(self) -> str:
        """Hash of classes, inputs and targets of all splits: other data has another one."""
        known: dict[str, str] = self.__dict__.setdefault("_fingerprint", {})
        if not known:
            digest = hashlib.sha256(repr(self.class_names()).encode())
            for split in self.splits:
                digest.update(split.encode())
                self.load(split).update_digest(digest)
            known["all"] = digest.hexdigest()[:16]
        return known["all"]

    def describe(self) -> dict[str, Any]:
        """Name, fingerprint and sizes, for the manifest."""
        sizes = {split: len(self.load(split)) for split in self.splits}
        return {"name": self.name, "fingerprint": self.fingerprint(), "classes": self.num_classes, "samples": sizes}
