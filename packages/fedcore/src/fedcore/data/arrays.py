"""Samples in memory, gathered by index batches, with batch-wise augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

__all__ = ["ArrayData", "Augment", "Transform"]

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""``augment(inputs (B, ...), generator) -> inputs``, on inputs as they are stored; training batches only."""
Transform = Callable[[Tensor], Tensor]
"""``transform(inputs (B, ...)) -> inputs``: what every batch goes through last, without any draw; one that changes the
shape of an input says so by ``output_shape(stored shape) -> shape``."""


class ArrayData(Dataset[tuple[Tensor, Tensor]]):
    """Inputs and targets as two tensors.

    Args:
        inputs: (N, ...) as stored: uint8 pictures, floats, or token ids (padded with 0).
        targets: (N,) int64 classes, or floats for a regression.
        groups: (N,) int64, natural client of each sample.
        group_names: names of the groups.
        augment: random change of a training batch, before ``transform``.
        transform: deterministic change of every batch, e.g. uint8 to normalised floats.

    Raises:
        ValueError: numbers of samples that differ.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        groups: Tensor | None = None,
        group_names: Sequence[str] = (),
        augment: Augment | None = None,
        transform: Transform | None = None,
    ) -> None:
        for name, tensor in (("targets", targets), ("groups", groups)):
            if tensor is not None and len(tensor) != len(inputs):
                raise ValueError(f"{len(inputs)} inputs, {len(tensor)} {name}")
        self._inputs, self._targets, self._groups = inputs, targets, groups
        self._index: Tensor | None = None
        self.group_names = tuple(group_names)
        self.augment = augment
        self.transform = transform

    def __len__(self) -> int:
        return len(self._inputs) if self._index is None else len(self._index)

    @property
    def inputs(self) -> Tensor:
        """Stored inputs (N, ...); a subset gathers them, so keep the result."""
        return self._chosen(self._inputs)

    @property
    def targets(self) -> Tensor:
        """Targets (N,)."""
        return self._chosen(self._targets)

    @property
    def groups(self) -> Tensor | None:
        """Natural client of each sample (N,), where there is one."""
        return None if self._groups is None else self._chosen(self._groups)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input as a model receives it; for text, of the longest."""
        stored = tuple(self._inputs.shape[1:])
        changed = getattr(self.transform, "output_shape", None)
        return stored if changed is None else changed(stored)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One sample, transformed but not augmented."""
        place = range(len(self))[index]
        inputs, targets = self.batch(torch.tensor([place]))
        return inputs[0], targets[0]

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The samples at ``indices`` (B,); without a generator nothing is augmented."""
        rows = self.rows(indices).to(self._inputs.device)
        inputs = self._inputs.index_select(0, rows)
        if generator is not None and self.augment is not None:
            inputs = self.augment(inputs, generator)
        return self._prepared(inputs), self._targets.index_select(0, rows)

    @property
    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """The tensors that batches are rows of, where nothing is done to these; ``rows`` says which rows."""
        return (self._inputs, self._targets) if self.augment is None and self.transform is None else None

    def rows(self, indices: Tensor) -> Tensor:
        """Rows of the stored tensors that ``indices`` (B,) of this subset mean."""
        return indices if self._index is None else self._index[indices]

    def subset(self, indices: Tensor | np.ndarray | Sequence[int], *, augment: bool = True) -> ArrayData:
        """The samples at ``indices`` (repeats allowed), sharing memory; ``augment=False`` leaves augmentation out."""
        chosen = torch.as_tensor(np.asarray(indices), dtype=torch.long)
        part = ArrayData.__new__(ArrayData)
        part.__dict__.update(self.__dict__)
        part._index = chosen if self._index is None else self._index[chosen]
        part.augment = self.augment if augment else None
        return part

    def to(self, device: torch.device | str) -> ArrayData:
        """The same samples on a device; batches are then gathered and augmented there."""
        moved = ArrayData.__new__(ArrayData)
        moved.__dict__.update(self.__dict__)
        for name in ("_inputs", "_targets", "_groups", "_index"):
            tensor = self.__dict__[name]
            moved.__dict__[name] = None if tensor is None else tensor.to(device)
        return moved

    def tensor_dataset(self) -> TensorDataset:
        """All samples transformed at once; without augmentation, and four times as large for uint8 pictures."""
        return TensorDataset(*self.batch(torch.arange(len(self))))

    def update_digest(self, digest: Any) -> None:
        """Add inputs, targets and groups to a hash."""
        for tensor in (self.inputs, self.targets, self.groups):
            if tensor is not None:
                digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
                digest.update(tensor.contiguous().cpu().numpy().data)

    def _chosen(self, tensor: Tensor) -> Tensor:
        return tensor if self._index is None else tensor[self._index]

    def _prepared(self, inputs: Tensor) -> Tensor:
        return inputs if self.transform is None else self.transform(inputs)
