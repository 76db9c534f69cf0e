"""Models of the published comparisons, by name: ``build(name, num_classes=..., input_shape=...)``."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MODELS", "build"]

MODELS: dict[str, str] = {
    "mlp": "fedcore.models.mlp:MLP",
}
"""Models of our own: name -> ``module:Class``; those of other libraries are ``timm:NAME`` and ``hf:FOLDER``."""


def build(name: str, *, num_classes: int, input_shape: tuple[int, ...], **options: Any) -> nn.Module:
    """A model with random weights on the CPU; its outputs are logits (B, num_classes).

    Args:
        name: a name of ``MODELS``, ``timm:NAME`` or ``hf:FOLDER``.
        num_classes: outputs.
        input_shape: shape of one input: (C, H, W) of pictures, (L,) of token ids.
        options: the model's own.

    Raises:
        UserError: unknown name or option, a shape that does not fit, or a missing extra.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; {did_you_mean(name, MODELS)}known: {', '.join(MODELS)}")
    module, _, attribute = MODELS[name].partition(":")
    made = getattr(importlib.import_module(module), attribute)
    known = [key for key in inspect.signature(made).parameters if key not in ("num_classes", "input_shape")]
    for key in options:
        if key not in known:
            hint = did_you_mean(key, known)
            raise UserError(f"model {name} has no option {key!r}; {hint}options: {', '.join(known) or 'none'}")
    model: nn.Module = made(num_classes=num_classes, input_shape=tuple(input_shape), **options)
    return model
