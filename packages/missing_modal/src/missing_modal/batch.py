"""What a model sees at a time: only the modalities that are there, packed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Batch"]


@dataclass
class Batch:
    """B samples of M modalities.

    Args:
        ids: B sample ids.
        masks: B patterns (bit masks over the model's modalities), on the host: no device is asked which tower to skip.
        inputs: per modality the rows of those samples that have it, in the order of the batch: (n_m, ...).
        rows: per modality (n_m,) int64, the samples that these rows belong to.
        labels: (B,) int64, or (B, C) float32 0/1 for several labels; None where unknown.
    """

    ids: list[str]
    masks: list[int]
    inputs: dict[str, Tensor]
    rows: dict[str, Tensor]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        move = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        rows = {name: value.to(device, non_blocking=True) for name, value in self.rows.items()}
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return replace(self, inputs=move, rows=rows, labels=labels)
