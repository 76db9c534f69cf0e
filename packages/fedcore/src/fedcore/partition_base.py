"""What a partition is: the indices of each client's training samples, and how they were chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from polymodal.errors import UserError

__all__ = ["Partition"]


@dataclass(frozen=True, eq=False, repr=False)
class Partition:
    """Indices of the training samples of each client.

    Args:
        clients: sorted int64 indices of each client; a sample may occur more than once where samples are refilled.
        size: samples of the training set.
        how: scheme and options it was made with, plain values.
        names: names of the clients, where they have some.

    Raises:
        UserError: an index outside the training set.
    """

    clients: tuple[np.ndarray, ...]
    size: int
    how: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for number, indices in enumerate(self.clients):
            if len(indices) and not (indices.min() >= 0 and indices.max() < self.size):
                raise UserError(
                    f"partition: client {number} has an index outside 0..{self.size - 1}; was it made for other data?"
                )

    def __repr__(self) -> str:
        return f"Partition({self.how.get('scheme', 'given')}: {len(self)} clients, {self.size} samples)"

    def __len__(self) -> int:
        return len(self.clients)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.clients)

    def __getitem__(self, client: int) -> np.ndarray:
        return self.clients[client]

    @classmethod
    def of(cls, clients: Sequence[Any], size: int, how: dict[str, Any], names: Sequence[str] = ()) -> Partition:
        """A partition from indices in any order and form."""
        return cls(tuple(np.sort(np.asarray(c, dtype=np.int64)) for c in clients), size, how, tuple(names))

    @property
    def sizes(self) -> list[int]:
        """Samples of each client."""
        return [len(indices) for indices in self.clients]

    @property
    def empty(self) -> list[int]:
        """Clients without samples."""
        return [number for number, indices in enumerate(self.clients) if not len(indices)]

    @property
    def repeated(self) -> int:
        """How many of the assigned samples are further copies of one that some client has already."""
        return sum(self.sizes) - len(np.unique(np.concatenate(self.clients))) if self.clients else 0

    def counts(self, labels: np.ndarray, num_classes: int | None = None) -> np.ndarray:
        """Samples of each class by client, (clients, C) int64; ``labels`` (N,) are those of the training set."""
        classes = int(num_classes or labels.max() + 1)
        return np.stack([np.bincount(labels[indices], minlength=classes) for indices in self.clients])

    def save(self, path: Path | str, *, data: str = "", fingerprint: str = "") -> None:
        """Write as JSON with a checksum; see ``fedcore.partition_files.save``."""
        from fedcore.partition_files import save

        save(self, Path(path), data=data, fingerprint=fingerprint)

    @classmethod
    def load(cls, path: Path | str, *, size: int | None = None, fingerprint: str | None = None) -> Partition:
        """Read and verify; see ``fedcore.partition_files.load``."""
        from fedcore.partition_files import load

        return load(Path(path), size=size, fingerprint=fingerprint)
