"""What the loaders yield."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Batch", "Sample", "collate"]


@dataclass
class Sample:
    """One picture as the network takes it.

    Args:
        id: name of the picture.
        image: (3, H, W) float32, normalised.
        label: (H, W) int64 channels, 0 background, 255 ignored.
        saliency: (H, W) bool, or None.
        replayed: whether it comes from the memory of earlier steps.
    """

    id: str
    image: Tensor
    label: Tensor
    saliency: Tensor | None = None
    replayed: bool = False


@dataclass
class Batch:
    """Pictures of one size.

    Args:
        ids: names of the pictures.
        images: (batch, 3, H, W) float32, normalised with ImageNet's mean and deviation.
        labels: (batch, H, W) int64 channels, 0 background, 255 ignored.
        saliency: (batch, H, W) bool, where the loader was given saliency maps.
        replayed: (batch,) bool: pictures from the memory of earlier steps, with labels as of their own step.
    """

    ids: list[str]
    images: Tensor
    labels: Tensor
    saliency: Tensor | None
    replayed: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device; from pinned memory the copy does not block."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        saliency = None if self.saliency is None else change(self.saliency)
        return replace(
            self,
            images=change(self.images),
            labels=change(self.labels),
            saliency=saliency,
            replayed=change(self.replayed),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one size."""
    maps = [sample.saliency for sample in samples if sample.saliency is not None]
    return Batch(
        ids=[sample.id for sample in samples],
        images=torch.stack([sample.image for sample in samples]),
        labels=torch.stack([sample.label for sample in samples]),
        saliency=torch.stack(maps) if len(maps) == len(samples) else None,
        replayed=torch.tensor([sample.replayed for sample in samples]),
    )
