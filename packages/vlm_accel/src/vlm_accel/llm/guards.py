"""What the engine refuses, with the remedy (LightVLM 7.1.5), and the caches it takes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from vlm_accel.llm.cache import TrackedLayer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from vlm_accel.llm.locate import Decoder
    from vlm_accel.schedule import Step
    from vlm_accel.session import Session

__all__ = ["check_call", "check_steps", "guard_generate", "new_cache", "track"]


def check_steps(steps: Sequence[Step], levels: int) -> None:
    """Refuse steps among the layers after which image features are added again (Qwen3-VL's DeepStack)."""
    early = [step.layer for step in steps if step.layer < levels]
    if early:
        raise UserError(
            f"llm step at layer {early[0]}: this model adds image features again after layers 0 to {levels - 1}; use "
            f"layer {levels} or later"
        )


def check_call(module: nn.Module, rows: Tensor, allow_grad: bool) -> None:
    """Refuse training mode and gradients."""
    if module.training:
        raise UserError("the model is in training mode; call model.eval() before accelerate")
    if torch.is_grad_enabled() and not allow_grad and any(p.requires_grad for p in module.parameters()):
        raise UserError("gradients are on; use torch.inference_mode(), or accelerate(..., allow_grad=True)")


def new_cache(config: Any) -> DynamicCache:
    """The cache that the decoder would make itself."""
    return DynamicCache(config=config)


def track(cache: Any, decoder: Decoder, shortens: bool) -> None:
    """Put ``TrackedLayer`` objects in place of the cache's layers; what they hold stays.

    Sliding layers become full ones where tokens may be merged (their window lives in the gathered mask); else they
    stay what they are.

    Raises:
        UserError: a static, quantized or linear cache.
    """
    if type(cache) is not DynamicCache:
        raise UserError(
            f"{type(cache).__name__} cannot follow shortened prompts; use the default cache (DynamicCache), no "
            "cache_implementation"
        )
    depth = len(decoder.layers)
    if not cache.layers:
        cache.layers.extend(DynamicLayer() for _ in range(depth))
        cache.layer_class_to_replicate = None
    layer: Any
    for number, layer in enumerate(cache.layers[:depth]):
        if isinstance(layer, TrackedLayer):
            continue
        sliding = isinstance(layer, DynamicSlidingWindowLayer)
        if not sliding and type(layer) is not DynamicLayer:
            raise UserError(f"cache layer {number} is a {type(layer).__name__}; only attention caches can be shortened")
        if sliding and not shortens:
            continue
        if sliding and layer.get_seq_length():
            raise UserError("a sliding-window cache was filled outside of the accelerate block; start with a new cache")
        cache.layers[number] = _tracked(layer)


def _tracked(layer: Any) -> TrackedLayer:
    made = TrackedLayer()
    if layer.is_initialized and layer.get_seq_length():
        made.lazy_initialization(layer.keys, layer.values)
        made.keys, made.values = layer.keys, layer.values
        made.logical = made.plain = layer.keys.shape[-2]
    return made


def guard_generate(session: Session, model: Any, has_steps: bool) -> None:
    """Refuse ways of generating that cannot work, before the first token; let ``image_mask`` through."""
    prepare = getattr(model, "_prepare_cache_for_generation", None)
    if prepare is not None:
        session.replace(model, "_prepare_cache_for_generation", functools.partial(_checked, prepare, has_steps))
    validate = getattr(model, "_validate_model_kwargs", None)
    if validate is not None:
        session.replace(model, "_validate_model_kwargs", functools.partial(_without_mask, validate))


def _checked(prepare: Any, has_steps: bool, config: Any, *args: Any, **kwargs: Any) -> Any:
    if config.use_cache is False and has_steps:
        raise UserError(
            "generate(use_cache=False) would choose image tokens anew at every step; use_cache=True, or plain forward "
            "calls"
        )
    if config.cache_implementation not in (None, "dynamic", "offloaded"):
        raise UserError(
            f"cache_implementation={config.cache_implementation!r} cannot follow shortened prompts; leave it out"
        )
    return prepare(config, *args, **kwargs)


def _without_mask(validate: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    return validate({k: v for k, v in model_kwargs.items() if k != "image_mask"}, *args, **kwargs)
