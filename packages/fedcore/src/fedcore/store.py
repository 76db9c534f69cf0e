"""States of clients between rounds: allocated when a client first takes part, in memory or mapped files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from fedcore.algorithm import Tree

__all__ = ["ClientStore"]


class ClientStore(Mapping[int, Tree]):
    """Client id -> state. A state that was stored does not change until the client takes part again.

    Args:
        limit_mib: memory for states; further ones live in memory-mapped files (None: no limit).
        folder: where these files go (default: a temporary folder that goes with the store).
    """

    def __init__(self, limit_mib: float | None = None, folder: Path | None = None) -> None:
        self._limit = None if limit_mib is None else int(limit_mib * 2**20)
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._rows: dict[int, Tree] = {}
        self.in_memory = 0
        self.changed: set[int] = set()
        """clients whose state changed since ``changed`` was last cleared, for incremental checkpoints"""

    def __getitem__(self, client: int) -> Tree:
        return self._rows[client]

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, client: int, state: Tree) -> None:
        """Store the state of a client; empty states take no place."""
        if not state:
            return
        self.changed.add(client)
        row = self._rows.get(client)
        if row is None or _layout(row) != _layout(state):
            self._rows[client] = {name: self._allocate(client, name, value) for name, value in state.items()}
            return
        for name, value in state.items():
            row[name].copy_(value)

    def clear(self) -> None:
        """Forget all states."""
        self._rows.clear()
        self.changed.clear()
        self.in_memory = 0

    def _allocate(self, client: int, name: str, value: torch.Tensor) -> torch.Tensor:
        size = value.numel() * value.element_size()
        if value.device.type != "cpu" or self._limit is None or self.in_memory + size <= self._limit or not size:
            self.in_memory += size
            return value.detach().clone()
        path = self._place() / f"{client}-{name}.bin"
        flat = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype)
        return flat.view(value.shape).copy_(value)

    def _place(self) -> Path:
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="fedcore-states-")
            self._folder = Path(self._temporary.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder


def _layout(state: Tree) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in state.items()}
