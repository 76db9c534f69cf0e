"""Large tensors that come and go in every step, in memory that stays mapped: fresh pages cost more than the sums."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Scratch"]

ALIGNMENT = 64
KEPT = 4
"""blocks that wait for use"""


class Scratch:
    """Uninitialised tensors on the CPU whose memory is used again once nothing refers to it any more.

    The C library returns large blocks to the system when they are freed, and every page of the next one is fetched
    anew. A tensor and all its views keep their block as long as any of them lives.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As ``torch.empty``; on an accelerator it is that, since memory stays with the process there anyway."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or not size:
            return torch.empty(shape, dtype=dtype, device=device)
        block = self._block(size)
        lease = block[:size]  # an array of its own: it ends with the last tensor on it
        weakref.finalize(lease, self._back, block).atexit = False
        return torch.from_numpy(lease).view(dtype).view(shape)

    def clear(self) -> None:
        """Forget all blocks that wait."""
        self._free.clear()

    def _block(self, size: int) -> np.ndarray:
        """The smallest free block of at least ``size`` bytes, or a new one."""
        for i, block in enumerate(self._free):
            if block.nbytes >= size:
                return self._free.pop(i)
        whole = np.empty(size + ALIGNMENT, dtype=np.uint8)
        shift = -whole.ctypes.data % ALIGNMENT
        return whole[shift : shift + size]

    def _back(self, block: np.ndarray) -> None:
        self._free.append(block)
        self._free.sort(key=lambda free: free.nbytes)
        del self._free[:-KEPT]
