"""Where a model keeps its decoder, and what of it the engine must know."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from polymodal.errors import UserError
from torch import nn

__all__ = [
    "Decoder",
    "cache_name",
    "check_backend",
    "deepstack_levels",
    "find_decoder",
    "image_token_ids",
    "inner_model",
]


@dataclass(frozen=True)
class Decoder:
    """The text decoder of a model.

    Args:
        module: what is called with ``inputs_embeds``. layers: its decoder layers. config: its (text) config.
    """

    module: nn.Module
    layers: nn.ModuleList
    config: Any


def inner_model(model: nn.Module) -> nn.Module:
    """The model without its head: what merges image features into the prompt."""
    return getattr(model, "model", model)  # type: ignore[no-any-return]


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder of ``model`` (LightVLM 7.2)."""
    inner: Any = inner_model(model)
    for name in ("language_model", "text_model"):
        if hasattr(inner, name):
            inner = getattr(inner, name)
            break
    return Decoder(inner, inner.layers, inner.config)


def image_token_ids(model: nn.Module) -> dict[str, int]:
    """{"image": id, "video": id} of the placeholder tokens, as far as the model has them."""
    config: Any = model.config
    found = {}
    for kind in ("image", "video"):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            value = getattr(config, name, None)
            if isinstance(value, int):
                found[kind] = value
                break
    return found


def deepstack_levels(model: nn.Module) -> int:
    """Layers after which image features are added again (Qwen3-VL); 0 for all other models."""
    vision = getattr(model.config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def cache_name(module: nn.Module) -> str:
    """``cache``, or ``past_key_values`` in transformers before it was renamed."""
    forward = inspect.unwrap(type(module).forward)
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def check_backend(decoder: Decoder, log_size: bool) -> str:
    """The decoder's attention implementation.

    Raises:
        UserError: one that takes neither a mask of the usual kinds nor none.
    """
    name = str(getattr(decoder.config, "_attn_implementation", None) or "eager")
    flash = "flash" in name
    if name not in ("sdpa", "eager") and not flash:
        raise UserError(
            f"attention implementation {name!r} is not supported; call model.set_attn_implementation('sdpa') first"
        )
    if flash and log_size:
        raise UserError(f"log_size needs an explicit mask, which {name} has not; use SDPA or eager attention")
    return name
