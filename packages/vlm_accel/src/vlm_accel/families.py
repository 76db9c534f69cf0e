"""Which models are known, and where their parts are. A model that is not here is refused, never left alone."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from vlm_accel.encoders.base import EncoderAdapter

__all__ = ["FAMILIES", "Family", "family_of", "load_encoder"]


@dataclass(frozen=True)
class Family:
    """One family of models.

    Args:
        name: as in tables.
        model_types: ``config.model_type`` values, or class names where a library has no configs.
        encoder: ``"module:Class"`` of its EncoderAdapter, called with the model; None: no encoder.
        decoder: whether it has a language model.
    """

    name: str
    model_types: tuple[str, ...]
    encoder: str | None
    decoder: bool


_E = "vlm_accel.encoders"
FAMILIES: tuple[Family, ...] = (
    Family("LLaVA 1.5", ("llava",), f"{_E}.llava:LlavaEncoder", True),
    Family("LLaVA-NeXT", ("llava_next",), f"{_E}.llava:LlavaNextEncoder", True),
    Family("LLaVA-OneVision", ("llava_onevision",), f"{_E}.llava:LlavaOnevisionEncoder", True),
    Family("Qwen2-VL", ("qwen2_vl",), f"{_E}.qwen:Qwen2VLEncoder", True),
    Family("Qwen2.5-VL", ("qwen2_5_vl",), f"{_E}.qwen:Qwen25VLEncoder", True),
    Family("Qwen3-VL", ("qwen3_vl",), f"{_E}.qwen:Qwen3VLEncoder", True),
    Family("InternVL", ("internvl",), f"{_E}.internvl:InternVLEncoder", True),
    Family("SmolVLM, Idefics3", ("smolvlm", "idefics3"), f"{_E}.smolvlm:SmolVLMEncoder", True),
    Family("CLIP", ("clip", "clip_vision_model"), f"{_E}.clip:ClipEncoder", False),
    Family("SigLIP", ("siglip", "siglip_vision_model"), f"{_E}.clip:SiglipEncoder", False),
    Family("DINOv2", ("dinov2", "dinov2_with_registers"), f"{_E}.dinov2:Dinov2Encoder", False),
    Family("timm ViT", ("VisionTransformer", "TimmModel", "Eva"), f"{_E}.timm:TimmEncoder", False),
    Family("open_clip", ("open_clip.VisionTransformer", "open_clip.CLIP"), f"{_E}.open_clip:OpenClipEncoder", False),
    Family(
        "language models",
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite"),
        None,
        True,
    ),
)


_TIMM = ("VisionTransformer", "Eva")


def family_of(model: nn.Module) -> Family:
    """The family of ``model``.

    Raises:
        UserError: not known; the message lists what is.
    """
    kind = model_type(model)
    for family in FAMILIES:
        if kind in family.model_types:
            return family
    known = [kind for family in FAMILIES for kind in family.model_types]
    raise UserError(
        f"cannot accelerate {type(model).__name__} (type {kind!r}): unknown model family; {did_you_mean(kind, known)}"
        f"known: {', '.join(known)}"
    )


def model_type(model: Any) -> str:
    """``config.model_type`` of a transformers model, else the class name (with ``open_clip.`` in front there)."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if isinstance(kind, str):
        return kind
    cls = type(model)
    if cls.__module__.startswith("timm."):
        # distilled and other variants are subclasses of the plain transformer, which refuses what it cannot do
        return next((base.__name__ for base in cls.__mro__ if base.__name__ in _TIMM), cls.__name__)
    if cls.__module__.startswith("open_clip") and cls.__name__ != "TimmModel":
        return f"open_clip.{'CLIP' if cls.__name__ in ('CLIP', 'CustomTextCLIP') else cls.__name__}"
    return cls.__name__


def load_encoder(family: Family, model: nn.Module) -> EncoderAdapter | None:
    """The adapter of the model's encoder; None where there is none."""
    if family.encoder is None:
        return None
    module, _, name = family.encoder.partition(":")
    adapter: EncoderAdapter = getattr(importlib.import_module(module), name)(model)
    return adapter
