"""Where a model keeps its decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Decoder", "find_decoder"]


@dataclass(frozen=True)
class Decoder:
    """The text decoder of a model.

    Args:
        module: what is called with ``inputs_embeds``. layers: its decoder layers. config: its (text) config.
    """

    module: nn.Module
    layers: nn.ModuleList
    config: Any


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder of ``model`` (LightVLM 7.2)."""
    inner = getattr(model, "model", model)
    for name in ("language_model", "text_model"):
        if hasattr(inner, name):
            inner = getattr(inner, name)
            break
    return Decoder(inner, inner.layers, inner.config)
