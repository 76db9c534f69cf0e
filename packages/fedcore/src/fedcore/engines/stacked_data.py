"""Batches of several clients as one: gathered together where they share memory, else one by one and stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedcore.engines.scratch import Scratch
from fedcore.engines.stacked_gradients import StackedBatch

if TYPE_CHECKING:
    from fedcore.batches import ClientData

__all__ = ["CannotStackError", "StackedData", "Windows"]

WINDOW_BYTES = 4 * 2**20
"""of inputs that are gathered at once for steps to come"""


class CannotStackError(ValueError):
    """Clients whose batches do not go together."""


class StackedData:
    """The data of some clients.

    Args:
        clients: theirs, in the order of the stack.
        device: where batches go.
        dtype: of the weights of samples.
        scratch: memory of batches.

    Attributes:
        errors: what the data of a client raised, by its place in the stack. Its batches are replaced by another's.
    """

    def __init__(
        self, clients: Sequence[ClientData], device: torch.device, dtype: torch.dtype, scratch: Scratch | None = None
    ) -> None:
        self._clients, self._device, self._dtype = clients, device, dtype
        self._scratch = scratch or Scratch()
        stored = [client.tensors for client in clients]
        first = stored[0]
        self.stored = all(tensors is not None and len(tensors) == 2 for tensors in stored)
        self._shared = self.stored and all(
            tensors is not None and first is not None and all(map(_same, tensors, first)) for tensors in stored
        )
        self.errors: dict[int, str] = {}

    def rows(self, place: int, indices: Sequence[Tensor]) -> Sequence[Tensor]:
        """Batches of a client as ``gather`` takes them: rows of the stored tensors, or as they are."""
        if not self.stored:
            return indices
        return self._clients[place].rows(torch.cat(list(indices))).split([index.numel() for index in indices])

    def window(self, count: int, width: int) -> int:
        """Steps that can be gathered at once for ``count`` clients with batches of ``width``; 1 where none can."""
        tensors = self._clients[0].tensors if self.stored else None
        if tensors is None:
            return 1
        sample = tensors[0][:1].numel() * tensors[0].element_size()
        return max(1, WINDOW_BYTES // max(1, sample * count * width))

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
        sizes = [row.numel() for row in rows]
        if self.stored:
            largest = max(sizes)
            batch = self.select([_padded(row, largest) for row in rows])
        else:
            batch = self._one_by_one(rows, sizes, generators)
        inputs, targets = (tensor.to(self._device, non_blocking=True) for tensor in batch)
        return StackedBatch(inputs, targets, self.weights(sizes, counts or sizes), sizes)

    def weights(self, sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
        """See ``StackedBatch``."""
        return _weights(sizes, counts).to(self._device, self._dtype)

    def select(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Stored inputs and targets (clients, n, ...) at ``rows``, n of each of the first clients."""
        if self._shared:
            together, tensors = torch.cat(list(rows)), self._clients[0].tensors or ()
            found = []
            for tensor in tensors:
                out = self._scratch.empty((together.numel(), *tensor.shape[1:]), tensor.dtype, tensor.device)
                torch.index_select(tensor, 0, together.to(tensor.device), out=out)
                found.append(out.unflatten(0, (len(rows), -1)))
            return found
        stacks: list[Tensor] = []
        for kind in range(2):
            parts = [self._clients[i].tensors[kind] for i in range(len(rows))]  # type: ignore[index]
            _check(parts)
            shape = (len(rows), rows[0].numel(), *parts[0].shape[1:])
            stack = self._scratch.empty(shape, parts[0].dtype, parts[0].device)
            for place, part in enumerate(parts):
                torch.index_select(part, 0, rows[place].to(part.device), out=stack[place])
            stacks.append(stack)
        return stacks

    def _one_by_one(
        self, rows: Sequence[Tensor], sizes: list[int], generators: Sequence[torch.Generator | None] | None
    ) -> list[Tensor]:
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for place, row in enumerate(rows):
            if place in self.errors:
                continue
            client = self._clients[place]
            try:
                found[place] = _pair(client.batch(row, generators[place] if generators and client.augments else None))
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
            stacks.append(torch.stack([_padded(part, largest) for part in parts]))
        if not stacks[1].is_floating_point() and bool((stacks[1] < 0).any()):
            raise CannotStackError("targets below zero, which losses leave out of their mean")
        return stacks


class Windows:
    """Batches of the local steps, several steps gathered at once where all samples are in memory.

    Args:
        data: of the clients.
        rows: batches of each client, from ``StackedData.rows``; clients with the most batches first.
    """

    def __init__(self, data: StackedData, rows: Sequence[Sequence[Tensor]]) -> None:
        self._data, self._rows = data, rows
        self._sizes = [[row.numel() for row in client] for client in rows]
        self._lines = [torch.cat(list(client)) for client in rows] if data.stored else []
        self._start = self._stop = self._active = 0
        self._inputs = self._targets = torch.empty(0)
        self._full: Tensor | None = None

    def batch(self, k: int, active: int, generators: Sequence[torch.Generator | None] | None = None) -> StackedBatch:
        """The batches of step k of the first ``active`` clients; steps have to be asked for in order."""
        if not self._data.stored:
            return self._data.gather([client[k] for client in self._rows[:active]], generators=generators)
        if k >= self._stop or active != self._active:
            self._gather(k, active)
        sizes, at = [client[k] for client in self._sizes[:active]], k - self._start
        if self._full is not None:
            return StackedBatch(self._inputs[:, at], self._targets[at], self._full, sizes)
        largest = max(sizes)
        weights = self._data.weights(sizes, sizes)
        return StackedBatch(self._inputs[:, at, :largest], self._targets[at, :, :largest], weights, sizes)

    def _gather(self, k: int, active: int) -> None:
        """Fetch the steps from k on, as long as all clients take part and memory allows."""
        left = len(self._rows[active - 1]) - k
        width = max(max(client[k:]) for client in self._sizes[:active])
        steps = min(left, self._data.window(active, width))
        self._start, self._stop, self._active = k, k + steps, active
        windows = [sizes[k : k + steps] for sizes in self._sizes[:active]]
        full = all(min(sizes) == width for sizes in windows)
        if full:
            places = [sum(sizes[:k]) for sizes in self._sizes[:active]]
            lines = [line.narrow(0, at, steps * width) for line, at in zip(self._lines, places, strict=False)]
        else:
            lines = [
                torch.cat([_padded(row, width) for row in client[k : k + steps]]) for client in self._rows[:active]
            ]
        self._inputs = self._targets = torch.empty(0)  # their memory serves the next ones
        inputs, targets = (part.unflatten(1, (steps, width)) for part in self._data.select(lines))
        self._inputs, self._targets = inputs, targets.transpose(0, 1).contiguous()
        self._full = self._data.weights([width] * active, [width] * active) if full else None


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
    missing = size - part.shape[0]
    return torch.cat([part, part[:1].expand(missing, *part.shape[1:])]) if missing else part


def _weights(sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
    """(clients, B) in float64, see ``StackedBatch``."""
    if min(sizes) == max(sizes) and min(counts) == max(counts):
        return torch.full((len(sizes), sizes[0]), 1.0 / counts[0], dtype=torch.float64)
    each = torch.tensor([1.0 / count for count in counts], dtype=torch.float64).unsqueeze(1)
    return each * (torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(1))


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())
