"""Trees of tensors as Flower's array records, and back with the same bits."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedcore.algorithm import Tree

__all__ = ["Encoder", "to_record", "to_tree"]

BITS = "fedcore.bits"
"""serialisation type of number formats that NumPy lacks: their bits as unsigned numbers, in NumPy's file format"""
_WORDS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


class Encoder:
    """Writes trees as records; a tensor that it meets again is not written a second time.

    Keep one for a round: what all clients are sent is then turned to bytes and hashed once.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Array]] = {}

    def record(self, tree: Tree) -> ArrayRecord:
        """A record with the tensors of ``tree`` under their names."""
        record = ArrayRecord()
        for name, value in tree.items():
            kept = self._made.get(id(value))
            if kept is None:
                kept = self._made[id(value)] = (value, _array(value))  # holding the tensor keeps its id taken
            record[name] = kept[1]
        return record


def to_record(tree: Tree) -> ArrayRecord:
    """A record with the tensors of ``tree``, of any shape and number format, under their names.

    Formats that NumPy knows are stored as Flower's own tools expect them; others (bfloat16, float8) by their bits.
    """
    return Encoder().record(tree)


def to_tree(record: ArrayRecord | None, device: torch.device | str = "cpu") -> Tree:
    """The tree of a record, bit for bit; ``{}`` for None.

    The tensors own their memory, which torch allocates: results of matrix products can depend on where a tensor starts.

    Raises:
        ValueError: an array that is not in NumPy's format, or of an unknown number format.
    """
    return {} if record is None else {name: _tensor(array).to(device) for name, array in record.items()}


def _array(value: Tensor) -> Array:
    value = value.detach().cpu().contiguous()
    try:
        return Array.from_numpy_ndarray(value.numpy())
    except TypeError:  # a format that NumPy lacks
        bits = Array.from_numpy_ndarray(value.view(_WORDS[value.element_size()]).numpy())
        return Array(str(value.dtype).removeprefix("torch."), tuple(value.shape), BITS, bits.data)


def _tensor(array: Array) -> Tensor:
    # Never pickled objects: records come from other machines.
    found = torch.from_numpy(np.load(BytesIO(array.data), allow_pickle=False))
    if array.stype != BITS:
        return found.clone()
    dtype = getattr(torch, array.dtype, None)
    if not isinstance(dtype, torch.dtype) or dtype.itemsize != found.element_size():
        raise ValueError(f"array of unknown number format {array.dtype!r}")
    return found.clone().view(dtype)
