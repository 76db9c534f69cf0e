"""Image towers: a ViT on pixels, and the same on patches that were cut already."""

from __future__ import annotations

from typing import Any

import torch
from polymodal.errors import UserError
from torch import Tensor
from torch.nn import functional

from missing_modal.backbones.transformer import ClassTower

__all__ = ["CLIP_MEAN", "CLIP_STD", "ImageTower", "PatchTower"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageTower(ClassTower):
    """A ViT with a class row: (b, channels, H, W) normalised pixels.

    Further weights: ``patch.weight`` (d, channels, p, p), ``patch.bias`` (may lack).

    Args:
        size: (H, W) in pixels.
        mean, std: by channel, with which pixels in [0, 1] are normalised (for readers).
        options: of ``TransformerTower``.
    """

    kind = "image"

    def __init__(
        self,
        *args: Any,
        size: tuple[int, int] = (224, 224),
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.size, self.mean, self.std = tuple(size), tuple(mean), tuple(std)
        self._need("patch.weight")

    def config(self) -> dict[str, Any]:
        """Arguments of the constructor besides the weights."""
        return super().config() | {"size": list(self.size), "mean": list(self.mean), "std": list(self.std)}

    def embed(self, x: Tensor) -> Tensor:
        """(b, channels, H, W) -> (b, 1 + patches, d). UserError for another size."""
        weight = self._weights["patch.weight"]
        if tuple(x.shape[1:]) != (weight.shape[1], *self.size):
            raise UserError(
                f"{self.identity}: images of shape {tuple(x.shape[1:])}; this tower takes "
                f"{(weight.shape[1], *self.size)}; resize them"
            )
        patches = functional.conv2d(x.to(weight.dtype), weight, self._weights.get("patch.bias"), weight.shape[2:])
        return self._tokens(patches.flatten(2).transpose(1, 2))

    def placeholder(self, count: int) -> Tensor:
        """Ones after normalisation (DCP 4.2)."""
        weight = self._weights["patch.weight"]
        return torch.ones(count, weight.shape[1], *self.size, dtype=weight.dtype, device=weight.device)


class PatchTower(ClassTower):
    """The same on patches (b, S, channels): small worlds whose images are lists of patches.

    Further weights: ``patch.weight`` (d, channels), ``patch.bias`` (may lack).
    """

    kind = "patches"

    def embed(self, x: Tensor) -> Tensor:
        """(b, S, channels) -> (b, 1 + S, d)."""
        weight = self._weights["patch.weight"]
        return self._tokens(functional.linear(x.to(weight.dtype), weight, self._weights.get("patch.bias")))

    def placeholder(self, count: int) -> Tensor:
        """Ones, as for images."""
        weight = self._weights["patch.weight"]
        patches = len(self._weights["position"]) - 1
        return torch.ones(count, patches, weight.shape[1], dtype=weight.dtype, device=weight.device)
