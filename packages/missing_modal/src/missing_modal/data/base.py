"""What every reader shares: samples with their modalities as they really are, labels, splits. No torch (the CLI)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from polymodal.errors import UserError

__all__ = ["SPLITS", "MMData", "MissingConfig", "Sample", "Task"]

SPLITS = ("train", "val", "test")
Task = Literal["multiclass", "multilabel", "binary"]


@dataclass(frozen=True)
class Sample:
    """One sample.

    Args:
        id: unique within the data set; several texts of one row share ``row``.
        row: id of the row that the missing table speaks of (MM-IMDb: one movie, several plots). Default: ``id``.
        inputs: per modality what leads to its data (a path, bytes, a text, an array); None: really missing.
        label: class number (multiclass, binary), tuple of 0/1 (multilabel), or None where unknown.
    """

    id: str
    inputs: dict[str, Any]
    label: int | tuple[int, ...] | None
    row: str = ""

    @property
    def table_id(self) -> str:
        """The row of the missing table."""
        return self.row or self.id


@dataclass
class MMData:
    """Base class of the readers; a subclass fills in ``class_names`` and ``read_split``.

    Args:
        root: folder (or file) of the data set in its official layout.
    """

    root: Path | None = None

    name: ClassVar[str] = ""
    task: ClassVar[Task] = "multiclass"
    modalities: ClassVar[tuple[str, ...]] = ("image", "text")
    metric: ClassVar[str] = "accuracy"
    """selects the best checkpoint: f1_macro, accuracy, auroc"""
    remedy: ClassVar[str] = "give the folder of the data set"

    def __post_init__(self) -> None:
        if self.root is not None:
            self.root = Path(self.root).expanduser()

    @property
    def kinds(self) -> dict[str, str]:
        """How each modality is decoded: image, text, audio or tabular."""
        return {name: name for name in self.modalities}

    @property
    def average_rows(self) -> bool:
        """Whether the probabilities of the samples of one row are averaged before they are scored."""
        return False

    def class_names(self) -> list[str]:
        """Names of the C outputs in their order."""
        raise NotImplementedError(f"{type(self).__name__}.class_names")

    def read_split(self, split: str) -> list[Sample]:
        """Samples of a split in the data set's order."""
        raise NotImplementedError(f"{type(self).__name__}.read_split")

    def prepare(self) -> None:
        """Make what must exist before reading; nothing for most readers."""

    def check(self) -> None:
        """Whether the layout is there (UserError names the first missing file)."""

    def describe(self) -> dict[str, Any]:
        """What the manifest says about the data, with its ``fingerprint``."""
        raise NotImplementedError(f"{type(self).__name__}.describe")

    def samples(self, split: str) -> list[Sample]:
        """Samples of a split, read once.

        Raises:
            UserError: unknown split, missing files, an id that occurs twice, a sample without any modality.
        """
        if split not in SPLITS:
            raise UserError(f"split {split!r}; expected one of {', '.join(SPLITS)}")
        known: dict[str, list[Sample]] = self.__dict__.setdefault("_samples", {})
        if split not in known:
            self.prepare()
            found = self.read_split(split)
            seen: set[str] = set()
            for sample in found:
                if sample.id in seen:
                    raise UserError(f"{self.name} {split}: {sample.id} occurs twice; remove one of the two")
                seen.add(sample.id)
                if all(value is None for value in sample.inputs.values()):
                    raise UserError(f"{self.name} {split}: {sample.id} has no modality at all; remove it")
            known[split] = found
        return known[split]


@dataclass
class MissingConfig:
    """Which modalities are taken away, by a seeded table (DCP 4.3)."""

    kind: str = "both"
    """image, text, both; any, only:NAME for other modalities; none"""
    ratio: float = 0.7
    """share of the rows that lack something, 0..1"""
    test_kind: str = ""
    """kind in val and test (default: as in training)"""
    test_ratio: float | None = None
    """ratio in val and test (default: as in training)"""
    seed: int = 0
    """of the tables"""
    tables: Path | None = None
    """folder with tables by split (JSON, or the official .pt files) in place of drawn ones"""
    simulate: bool = False
    """in training a complete row draws its pattern anew at every access (the official simulate_missing)"""
    weights: dict[str, float] = field(default_factory=dict)
    """kind any: weight of each pattern, by name"""

    def __post_init__(self) -> None:
        for name in ("ratio", "test_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"missing.{name}={value}; expected a share from 0 to 1")
