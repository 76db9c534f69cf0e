"""What a model sees at a time: only the modalities that are there, packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
        lengths: per modality the token rows that matter, where the data module knows them: up to the batch's last end
            of text. ``inputs`` keep all positions, because dynamic prompts look at the padding as well (DCP 3.4).
    """

    ids: list[str]
    masks: list[int]
    inputs: dict[str, Tensor]
    rows: dict[str, Tensor]
    labels: Tensor | None = None
    lengths: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        move = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        rows = {name: value.to(device, non_blocking=True) for name, value in self.rows.items()}
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return replace(self, inputs=move, rows=rows, labels=labels)

    def restrict(self, masks: Sequence[int], modalities: Sequence[str]) -> Batch:
        """The same samples with fewer modalities.

        Args:
            masks: B patterns; each a part of the sample's own (what is not there cannot come back).
            modalities: names in the order of the bits.
        """
        if len(masks) != len(self.masks) or any(
            new & ~old or not new for new, old in zip(masks, self.masks, strict=True)
        ):
            raise ValueError("each pattern must be a non-empty part of what the sample has")
        inputs, rows = {}, {}
        for bit, name in enumerate(modalities):
            held = [sample for sample, mask in enumerate(self.masks) if mask >> bit & 1]
            keep = [place for place, sample in enumerate(held) if masks[sample] >> bit & 1]
            if keep:
                same = len(keep) == len(held)
                inputs[name] = self.inputs[name] if same else self.inputs[name][keep]
                rows[name] = self.rows[name] if same else self.rows[name][keep]
        return replace(self, masks=list(masks), inputs=inputs, rows=rows)
