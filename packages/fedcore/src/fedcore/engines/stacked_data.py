"""Batches of several clients as one: gathered together where they share memory, else one by one and stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedcore.engines.stacked_gradients import StackedBatch

if TYPE_CHECKING:
    from fedcore.batches import ClientData

__all__ = ["CannotStackError", "StackedData"]


class CannotStackError(ValueError):
    """Clients whose batches do not go together."""


class StackedData:
    """The data of some clients.

    Args:
        clients: theirs, in the order of the stack.
        device: where batches go.
        dtype: of the weights of samples.

    Attributes:
        errors: what the data of a client raised, by its place in the stack. Its batches are replaced by another's.
    """

    def __init__(self, clients: Sequence[ClientData], device: torch.device, dtype: torch.dtype) -> None:
        self._clients, self._device, self._dtype = clients, device, dtype
        stored = [client.tensors for client in clients]
        first = stored[0]
        self._stored = all(tensors is not None and len(tensors) == 2 for tensors in stored)
        self._shared = self._stored and all(
            tensors is not None and first is not None and all(map(_same, tensors, first)) for tensors in stored
        )
        self.errors: dict[int, str] = {}

    def rows(self, place: int, indices: Sequence[Tensor]) -> Sequence[Tensor]:
        """Batches of a client as ``gather`` takes them: rows of the stored tensors, or as they are."""
        if not self._stored:
            return indices
        return self._clients[place].rows(torch.cat(list(indices))).split([len(index) for index in indices])

    def gather(
        self,
        rows: Sequence[Tensor],
        counts: Sequence[int] | None = None,
        generators: Sequence[torch.Generator | None] | None = None,
    ) -> StackedBatch:
        """A batch of each of the first ``len(rows)`` clients.

        Args:
            rows: from ``rows``, one client after the other.
            counts: what a client's losses are divided by (default: the size of its batch).
            generators: of the augmentation, where the data has one.

        Raises:
            CannotStackError: batches of shapes that differ, or that are not two tensors.
        """
        sizes = [len(row) for row in rows]
        batch = self._from_tensors(rows, sizes) if self._stored else self._one_by_one(rows, sizes, generators)
        inputs, targets = (tensor.to(self._device, non_blocking=True) for tensor in batch)
        weights = _weights(sizes, counts or sizes).to(self._device, self._dtype)
        return StackedBatch(inputs, targets, weights, sizes)

    def _from_tensors(self, rows: Sequence[Tensor], sizes: list[int]) -> list[Tensor]:
        largest = max(sizes)
        if min(sizes) < largest:
            rows = [row if n == largest else _padded(row, largest) for row, n in zip(rows, sizes, strict=True)]
        if self._shared:
            together, tensors = torch.cat(list(rows)), self._clients[0].tensors or ()
            return [tensor[together].unflatten(0, (len(rows), largest)) for tensor in tensors]
        stacks: list[Tensor] = []
        for kind in range(2):
            parts = [self._clients[i].tensors[kind] for i in range(len(rows))]  # type: ignore[index]
            _check([part[:0] for part in parts])
            stack = parts[0].new_empty((len(rows), largest, *parts[0].shape[1:]))
            for place, part in enumerate(parts):
                torch.index_select(part, 0, rows[place], out=stack[place])
            stacks.append(stack)
        return stacks

    def _one_by_one(
        self, rows: Sequence[Tensor], sizes: list[int], generators: Sequence[torch.Generator | None] | None
    ) -> list[Tensor]:
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for place, row in enumerate(rows):
            if place in self.errors:
                continue
            try:
                found[place] = _pair(self._clients[place].batch(row, generators[place] if generators else None))
            except CannotStackError:
                raise
            except Exception as error:  # whatever a client's data raises drops this client, not the others
                self.errors[place] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        if not found:
            raise CannotStackError("no client has data that can be read")
        stand_in = next(iter(found.values()))
        pairs = [found.get(place, stand_in) for place in range(len(rows))]
        for place in range(len(rows)):
            sizes[place] = len(pairs[place][0])
        largest = max(sizes)
        stacks = []
        for kind in range(2):
            parts = [pair[kind] for pair in pairs]
            _check(parts)
            stacks.append(torch.stack([part if len(part) == largest else _padded(part, largest) for part in parts]))
        if not stacks[1].is_floating_point() and bool((stacks[1] < 0).any()):
            raise CannotStackError("targets below zero, which losses leave out of their mean")
        return stacks


def _pair(batch: object) -> tuple[Tensor, Tensor]:
    if (
        not isinstance(batch, (tuple, list))
        or len(batch) != 2
        or not all(isinstance(part, Tensor) and part.ndim for part in batch)
        or len(batch[0]) != len(batch[1])
    ):
        raise CannotStackError("batches are not pairs of tensors, inputs and targets")
    return batch[0], batch[1]


def _check(parts: Sequence[Tensor]) -> None:
    """All parts have samples of one shape and number format."""
    if any(part.shape[1:] != parts[0].shape[1:] or part.dtype != parts[0].dtype for part in parts):
        raise CannotStackError("samples of clients differ in shape or number format")


def _padded(part: Tensor, size: int) -> Tensor:
    """``part`` (B, ...) with its first sample repeated, (size, ...)."""
    return torch.cat([part, part[:1].expand(size - len(part), *part.shape[1:])])


def _weights(sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
    """(clients, B) in float64, see ``StackedBatch``."""
    if min(sizes) == max(sizes) and min(counts) == max(counts):
        return torch.full((1, 1), 1.0 / counts[0], dtype=torch.float64)
    each = torch.tensor([1.0 / count for count in counts], dtype=torch.float64).unsqueeze(1)
    return each * (torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(1))


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())
