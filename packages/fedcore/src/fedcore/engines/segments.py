"""Memory that processes share, without a name: nothing is left in the file system, however they end."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore.algorithm import Tree

__all__ = ["Layout", "Place", "Segment", "layout_of", "read", "write"]

ALIGNMENT = 64
"""as torch allocates: results of matrix products can depend on where a tensor starts in its cache line"""


class Place(NamedTuple):
    """Where a tensor lies in a segment.

    Args:
        tree: which of the trees that are stored together.
        name: within the tree.
        dtype: of the tensor.
        shape: of the tensor.
        start: first byte.
    """

    tree: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


Layout = tuple[Place, ...]


class Segment:
    """A piece of shared memory, known by a file descriptor that can be sent to another process.

    Args:
        size: bytes.
        descriptor: of memory that another process made; a new piece without.

    Attributes:
        descriptor: stays open until ``seal`` or the end of the object; the memory lives on as long as it is mapped.
    """

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        self.size = max(size, mmap.PAGESIZE)
        if descriptor is None:
            descriptor = _nameless()
            os.ftruncate(descriptor, self.size)
        self.descriptor = descriptor
        self._bytes = torch.frombuffer(mmap.mmap(descriptor, self.size), dtype=torch.uint8)

    def seal(self) -> None:
        """Close the descriptor; the memory stays mapped here."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "descriptor", -1) >= 0:
            self.seal()

    def tensor(self, place: Place) -> Tensor:
        """The tensor at a place, as a view of the memory."""
        count = 1
        for length in place.shape:
            count *= length
        size = count * place.dtype.itemsize
        return self._bytes[place.start : place.start + size].view(place.dtype).view(place.shape)


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedcore", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def layout_of(trees: Sequence[Tree]) -> tuple[Layout, int]:
    """Places of all tensors of some trees, one after the other, and the bytes that they take."""
    places, at = [], 0
    for index, tree in enumerate(trees):
        for name, value in tree.items():
            places.append(Place(index, name, value.dtype, tuple(value.shape), at))
            at += -(-value.numel() * value.element_size() // ALIGNMENT) * ALIGNMENT
    return tuple(places), at


def write(segment: Segment, layout: Layout, trees: Sequence[Tree]) -> None:
    """Copy trees to their places."""
    for place in layout:
        segment.tensor(place).copy_(trees[place.tree][place.name])


def read(segment: Segment | None, layout: Layout, count: int) -> list[Tree]:
    """The ``count`` trees that were written, as views."""
    trees: list[Tree] = [{} for _ in range(count)]
    for place in layout:
        assert segment is not None
        trees[place.tree][place.name] = segment.tensor(place)
    return trees
