"""What a backbone must offer, and what the network returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

__all__ = ["FeatureExtractor", "Features", "Output"]


@dataclass
class Features:
    """Result of a feature extractor.

    Args:
        feature: (batch, out_channels, h, w), what the heads read.
        stages: outputs of the backbone's stages, coarse to the end, before the last activation where the architecture
            has one there (PLOP distils them); empty where the architecture has none.
    """

    feature: Tensor
    stages: list[Tensor] = field(default_factory=list)


@dataclass
class Output:
    """Result of the network.

    Args:
        logits: (batch, 1 + seen classes, h, w) at feature resolution, channel 0 is background.
        feature: (batch, D, h, w) what the heads read.
        stages: see ``Features``.
        unknown: (batch, 1, h, w) logit of the class "unknown" (SSUL), or None.
    """

    logits: Tensor
    feature: Tensor
    stages: list[Tensor]
    unknown: Tensor | None = None


class FeatureExtractor(nn.Module, ABC):
    """Backbone and neck: an image to a feature map. Adapters of other libraries subclass this.

    Attributes:
        out_channels: D of the feature map.
        stride: pixels of the image a pixel of the feature map.
    """

    out_channels: int
    stride: int

    @abstractmethod
    def forward(self, x: Tensor) -> Features:
        """Features of normalised images ``x`` (batch, 3, H, W)."""

    @abstractmethod
    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters with the backbone's learning rate."""

    @abstractmethod
    def neck_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters with the heads' learning rate (ASPP, decode head); may be none."""
