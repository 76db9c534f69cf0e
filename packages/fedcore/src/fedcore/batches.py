"""A client's training data: any torch dataset, read by index batches instead of a loader per client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from polymodal.errors import UserError
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate

__all__ = ["ClientData"]


class ClientData:
    """Batches of one client's data by index.

    Args:
        dataset: a ``TensorDataset`` or nested ``Subset`` of one (gathered without touching single samples); an object
            with ``__len__`` and ``batch(indices, generator)`` (its own gathering and augmentation), and perhaps
            ``tensors`` and ``rows(indices)`` where its batches are rows of stored tensors; or any map-style dataset,
            whose samples are collated one by one.

    Raises:
        UserError: an object without a length or without samples by index.
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__len__") or not (hasattr(dataset, "__getitem__") or hasattr(dataset, "batch")):
            raise UserError(f"client data of type {type(dataset).__name__}; expected a map-style dataset with a length")
        self.size = len(dataset)
        self._index: Tensor | None = None
        while isinstance(dataset, Subset) and type(dataset).__getitem__ is Subset.__getitem__:
            index = torch.as_tensor(dataset.indices, dtype=torch.long)
            self._index = index if self._index is None else index[self._index]
            dataset = dataset.dataset
        self._dataset = dataset
        # Not where a subclass makes something else of a sample, by a transform for instance.
        self._stored = isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__
        self._gather = self._chosen_gather()

    def __len__(self) -> int:
        return self.size

    def _chosen_gather(self) -> Callable[[Tensor, torch.Generator | None], Any]:
        if self._stored:
            return self._from_tensors
        if hasattr(self._dataset, "batch"):
            return self._dataset.batch  # type: ignore[no-any-return]
        return self._collate

    def _from_tensors(self, index: Tensor, generator: torch.Generator | None) -> Any:
        return tuple([tensor.index_select(0, index.to(tensor.device)) for tensor in self._dataset.tensors])

    def _collate(self, index: Tensor, generator: torch.Generator | None) -> Any:
        return default_collate([self._dataset[i] for i in index.tolist()])

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Any:
        """The samples at ``indices`` (B,) of this client; ``generator`` draws the augmentation, None leaves it out."""
        return self._gather(indices if self._index is None else self._index[indices], generator)

    @property
    def augments(self) -> bool:
        """Whether training batches are drawn with a generator."""
        # An object that gathers its own batches and does not say is given one.
        return hasattr(self._dataset, "batch") and getattr(self._dataset, "augment", self) is not None

    @property
    def tensors(self) -> tuple[Tensor, ...] | None:
        """The underlying tensors where all samples are in memory and nothing is drawn, for stacked gathering."""
        if self._stored:
            return self._dataset.tensors  # type: ignore[no-any-return]
        return self._dataset.tensors if hasattr(self._dataset, "rows") and hasattr(self._dataset, "tensors") else None

    def rows(self, indices: Tensor) -> Tensor:
        """Rows of ``tensors`` that this client's ``indices`` mean."""
        own = indices if self._index is None else self._index[indices]
        return own if self._stored else self._dataset.rows(own)  # type: ignore[no-any-return]
