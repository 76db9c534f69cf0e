"""Build the network that the configuration names. Libraries of adapters are imported only where one is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from polymodal.errors import UserError, did_you_mean

from css.models.base import FeatureExtractor
from css.models.heads import HeadKind
from css.models.network import CSSNet

if TYPE_CHECKING:
    from css.settings import NetworkConfig

__all__ = ["NAMES", "build_extractor", "build_network"]

NAMES = ("tiny", "deeplabv3_resnet50", "deeplabv3_resnet101")
"""Networks of our own; those of other libraries: timm:NAME, hf:FOLDER, mmseg:CONFIG."""


class NetworkChoices(Protocol):
    """What a method decides about the network."""

    @property
    def detach_background(self) -> bool: ...
    @property
    def head(self) -> HeadKind: ...
    @property
    def unknown(self) -> bool: ...


def build_network(config: NetworkConfig, channels: Sequence[int], *, method: NetworkChoices) -> CSSNet:
    """A network with a head for each step so far.

    Args:
        config: name and options of the extractor.
        channels: number of classes of each step so far.
        method: form of the heads.

    Returns:
        The network, with random heads, on the CPU.

    Raises:
        UserError: unknown name, missing extra, or weights that do not fit.
    """
    return CSSNet(
        build_extractor(config),
        channels,
        detach_background=method.detach_background,
        head=method.head,
        unknown=method.unknown,
    )


def build_extractor(config: NetworkConfig) -> FeatureExtractor:
    """Backbone and neck by name.

    Raises:
        UserError: unknown name, missing extra, or weights that do not fit.
    """
    library, colon, name = config.name.partition(":")
    if colon:
        return _adapter(library, name, config)
    if config.name == "tiny":
        return _tiny(config)
    if config.name.startswith("deeplabv3"):
        from css.models.deeplab import DeepLabV3

        return DeepLabV3(
            config.name.removeprefix("deeplabv3_"),
            weights=config.weights,
            output_stride=config.output_stride,
            dropout=config.dropout,
        )
    hint = did_you_mean(config.name, NAMES)
    raise UserError(
        f"unknown network {config.name!r}; {hint}known: {', '.join(NAMES)}, timm:NAME, hf:FOLDER, mmseg:CONFIG"
    )


def _tiny(config: NetworkConfig) -> FeatureExtractor:
    from css.models.tiny import TinyExtractor

    if config.weights is not None:
        raise UserError(f"network.weights={config.weights}: the tiny network takes no file of weights; leave it out")
    return TinyExtractor(config.width)


def _adapter(library: str, name: str, config: NetworkConfig) -> FeatureExtractor:
    if not name:
        raise UserError(f"network {config.name!r}; give timm's name, a folder (hf) or a config (mmseg) after the colon")
    if library == "timm":
        from css.models.timm_ import TimmExtractor

        return TimmExtractor(name, weights=config.weights, output_stride=config.output_stride)
    if library == "hf":
        from css.models.hf import HFExtractor

        return HFExtractor(name, weights=config.weights)
    if library == "mmseg":
        from css.models.mmseg_ import MMSegExtractor

        return MMSegExtractor(name, weights=config.weights)
    raise UserError(f"network {config.name!r}; adapters are timm:NAME, hf:FOLDER, mmseg:CONFIG")
