"""Records of evaluated samples, side by side as arrays. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from polymodal.errors import UserError

from missing_modal.metrics import mean_by_row

if TYPE_CHECKING:
    from missing_modal.data.base import Task

__all__ = ["Packed", "pack"]


@dataclass(frozen=True)
class Packed:
    """Records of a split.

    Args:
        ids: N samples, or rows where the reader averages over a row's samples.
        logits: (N, C).
        labels: (N,), or (N, C) for several labels.
        masks: (N,) patterns.
    """

    ids: list[str]
    logits: np.ndarray
    labels: np.ndarray
    masks: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def pack(records: Mapping[str, Mapping[str, Any]], task: Task) -> Packed:
    """Records of ``MMModule.evaluate`` as arrays.

    Samples with a ``row`` are averaged by row (DCP 3.6, plots="mean"); the row's label and pattern are those of its
    first sample.

    Raises:
        UserError: no records, or a sample without a label.
    """
    if not records:
        raise UserError("there are no samples to score; the split is empty")
    unlabelled = next((name for name, record in records.items() if record["label"] is None), None)
    if unlabelled is not None:
        raise UserError(f"sample {unlabelled} has no label, nothing to score; mm-predict takes such samples")
    ids, rows = list(records), list(records.values())
    logits, labels = np.stack([row["logits"] for row in rows]), np.array([row["label"] for row in rows])
    masks = np.array([row["mask"] for row in rows])
    if rows[0].get("row") is None:
        return Packed(ids, logits, labels, masks)
    names = [row["row"] for row in rows]
    first: dict[str, int] = {}
    for number, name in enumerate(names):
        first.setdefault(name, number)
    ids, logits = mean_by_row(logits, names, task)
    chosen = [first[name] for name in ids]
    return Packed(ids, logits, labels[chosen], masks[chosen])
