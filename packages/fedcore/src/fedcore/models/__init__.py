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
    "lenet5": "fedcore.models.lenet:LeNet5",
    "cnn": "fedcore.models.lenet:LeNet5",
    "resnet10_gn": "fedcore.models.resnet:resnet10_gn",
    "resnet18_gn": "fedcore.models.resnet:resnet18_gn",
    "resnet34_gn": "fedcore.models.resnet:resnet34_gn",
    "deit_tiny": "fedcore.models.deit:DeiTTiny",
    "bag": "fedcore.models.bag:Bag",
    "text_transformer": "fedcore.models.text_transformer:TextTransformer",
}
"""Models of our own: name -> ``module:Class``; those of other libraries are ``timm:NAME`` and ``hf:FOLDER``.
``cnn`` is the name of ``lenet5`` in benchmarks."""


def build(name: str, *, num_classes: int, input_shape: tuple[int, ...], **options: Any) -> nn.Module:
    """A model on the CPU that returns logits (B, num_classes); weights are random, drawn from torch's global generator.

    Args:
        name: a name of ``MODELS``, ``timm:NAME`` or ``hf:FOLDER``; these may have weights of their own.
        num_classes: outputs.
        input_shape: shape of one input: (C, H, W) of pictures, (L,) of token ids or of plain features.
        options: the model's own; ``vocabulary`` is the number of token ids of text data.

    Raises:
        UserError: unknown name or option, a shape that does not fit, or a missing extra.
    """
    shape = tuple(int(side) for side in input_shape)
    library, colon, inner = name.partition(":")
    if colon:
        return _adapter(library, inner, num_classes, shape, options)
    if name not in MODELS:
        hint = did_you_mean(name, MODELS)
        raise UserError(f"unknown model {name!r}; {hint}known: {', '.join(MODELS)}, timm:NAME, hf:FOLDER")
    module, _, attribute = MODELS[name].partition(":")
    made = getattr(importlib.import_module(module), attribute)
    known = [key for key in inspect.signature(made).parameters if key not in ("num_classes", "input_shape")]
    if options.get("vocabulary") and "vocabulary" not in known:
        raise UserError(
            f"model {name} does not take texts; choose bag or text_transformer, or hf:FOLDER with its tokenizer"
        )
    for key in options:
        if key not in known:
            hint = did_you_mean(key, known)
            raise UserError(f"model {name} has no option {key!r}; {hint}options: {', '.join(known) or 'none'}")
    model: nn.Module = made(num_classes=num_classes, input_shape=shape, **options)
    return model


def _adapter(library: str, name: str, classes: int, shape: tuple[int, ...], options: dict[str, Any]) -> nn.Module:
    if library == "timm" and name:
        from fedcore.models.timm_model import timm_model

        return timm_model(name, num_classes=classes, input_shape=shape, **options)
    if library == "hf" and name:
        from fedcore.models.hf import hf_model

        return hf_model(name, num_classes=classes, input_shape=shape, **options)
    raise UserError(f"model {library}:{name}; adapters are timm:NAME and hf:FOLDER")
