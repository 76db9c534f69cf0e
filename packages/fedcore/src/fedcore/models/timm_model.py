"""Classifiers of timm by name; extra ``polymodal-fedcore[timm]``."""

from __future__ import annotations

from typing import Any

import torch
from polymodal.errors import UserError, did_you_mean
from torch import nn

from fedcore.models.lenet import picture_shape

__all__ = ["timm_model"]

_FAULTS = (RuntimeError, TypeError, ValueError, AssertionError, KeyError, AttributeError, ZeroDivisionError)


def timm_model(name: str, *, num_classes: int, input_shape: tuple[int, ...], **options: Any) -> nn.Module:
    """A model of timm with random weights; nothing is downloaded.

    Args:
        name: timm's.
        num_classes: outputs.
        input_shape: (channels, height, width); ``img_size`` is passed on where the model takes it.
        options: of ``timm.create_model``; ``weights``: a local file with the model's weights (safetensors or torch),
            whose classifier may be another.

    Raises:
        UserError: timm is missing, an unknown name or option, or weights that do not fit.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UserError(f"model timm:{name} needs timm: pip install 'polymodal-fedcore[timm]'") from error
    channels, height, width = picture_shape(f"timm:{name}", input_shape)
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}; {did_you_mean(name, timm.list_models())}see timm.list_models()")
    weights = options.pop("weights", None)
    if options.get("pretrained"):
        raise UserError("pretrained=True would download; give a local file with model.options.weights instead")
    common = {"num_classes": num_classes, "in_chans": channels, **options}
    try:
        try:
            model: nn.Module = timm.create_model(name, img_size=(height, width), **common)
        except TypeError as error:  # convolutional models take any size and have no such option
            if "img_size" not in str(error):
                raise
            model = timm.create_model(name, **common)
        if weights is not None:
            _load(model, weights)
        model.eval()
        with torch.no_grad():
            model(torch.zeros(2, channels, height, width))
    except _FAULTS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"timm cannot build {name} for inputs {input_shape}: {reason}") from error
    return model.train()


def _load(model: nn.Module, path: Any) -> None:
    """Weights from a file; a classifier of another shape is left out.

    Raises:
        UserError: missing, broken, or of another model.
    """
    from polymodal.weights import load_tensors

    tensors, own = load_tensors(path), model.state_dict()
    classifier = getattr(model, "default_cfg", {}).get("classifier", "")
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    heads = {key for key in own if any(key.startswith(f"{name}.") for name in names if name)}
    kept = {key: value for key, value in tensors.items() if key not in heads or value.shape == own[key].shape}
    wrong = [key for key, value in kept.items() if key not in own or value.shape != own[key].shape]
    missing = [key for key in own if key not in kept and key not in heads]
    if wrong or missing:
        raise UserError(
            f"weights {path} are not those of the model: {len(missing)} missing, {len(wrong)} unknown or of another"
            f" shape ({', '.join([*missing, *wrong][:2])}); give that model's file"
        )
    model.load_state_dict(kept, strict=False)
