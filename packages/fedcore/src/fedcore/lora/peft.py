"""Models of PEFT in and out: its LoRA of linear layers as ours, ours as its; extra ``polymodal-fedcore[peft]``.

A model of PEFT can also be given to ``Simulation`` as it is: its adapters are found by the same names.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from polymodal.errors import UserError
from torch import nn

from fedcore.adapters import find_adapters
from fedcore.lora.adapter import PlainLora, export_plain, inner_prefix, peft_config, trained_whole
from fedcore.lora.linear import LoraLinear, is_linear

__all__ = ["from_peft", "to_peft"]

NAME = "default"
"""of the adapter in models that are made here"""


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise UserError("this needs peft: pip install 'polymodal-fedcore[peft]'") from error
    return peft


@torch.no_grad()
def from_peft(model: nn.Module) -> nn.Module:
    """A copy of a PEFT model with our layers in place of its, and the same function.

    Adapters require a gradient, and what PEFT keeps as ``modules_to_save``; all else is as it was.

    Args:
        model: a ``PeftModel``, or a model into which PEFT has injected LoRA layers.

    Returns:
        The model inside, e.g. of transformers, with ``LoraLinear`` layers.

    Raises:
        UserError: PEFT is missing, the model has no LoRA, or LoRA of another kind than plain on linear layers.
    """
    peft = _peft()
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    found = copy.deepcopy(inner)
    layers = [(n, x) for n, x in found.named_modules() if isinstance(x, peft.tuners.tuners_utils.BaseTunerLayer)]
    if not layers:
        raise UserError(f"{type(inner).__name__} has no adapter of PEFT; make it with peft.get_peft_model")
    for name, layer in layers:
        _put(found, name, _ours(name, layer, peft))
    for name, wrapper in list(found.named_modules()):
        if isinstance(wrapper, peft.utils.ModulesToSaveWrapper):
            _put(found, name, wrapper.modules_to_save[wrapper.active_adapters[0]].requires_grad_(True))
        elif isinstance(wrapper, peft.utils.other.AuxiliaryTrainingWrapper):
            raise UserError(
                f"{name} is wrapped in {type(wrapper).__name__}; only LoRA of linear layers can be taken over"
            )
    return found


def _ours(name: str, layer: Any, peft: Any) -> LoraLinear:
    """The layer of PEFT as ours.

    Raises:
        UserError: it adds more than ``scaling B A``, or not to a linear layer.
    """
    kind = type(layer).__name__
    if not isinstance(layer, peft.tuners.lora.Linear) or not is_linear(layer.base_layer):
        raise UserError(f"{name} is adapted by PEFT's {kind}; only LoRA of linear layers can be taken over")
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(active) != 1:
        raise UserError(f"{name} has {len(active)} active adapters; choose one with model.set_adapter(NAME)")
    adapter = active[0]
    for bad, why in (
        (layer.merged, "is merged into its base; call unmerge_adapter first"),
        (layer.use_dora.get(adapter) or adapter in layer.lora_variant, "is no plain LoRA"),
        (layer.lora_bias.get(adapter), "has a bias"),
    ):
        if bad:
            raise UserError(f"the adapter of {name} {why}; only plain LoRA can be taken over")
    dropout = getattr(layer.lora_dropout[adapter], "p", 0.0)
    factors = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    made = LoraLinear(layer.base_layer, len(factors[0]), float(layer.scaling[adapter]), dropout, factors=factors)
    return made.train(layer.training)


@torch.no_grad()
def to_peft(module: nn.Module, original: nn.Module | None = None) -> Any:
    """A ``PeftModel`` of the same function, for ``save_pretrained`` and all else that PEFT does.

    Args:
        module: with our adapters; of our wrappers around models of transformers, the model inside is taken.
        original: the model that the adapters were put into. Where the base was split or moved, the adapters become
            plain LoRA of these weights (of twice the rank after a split), so that they can be loaded by anyone who has
            them; without it, they belong to the base in ``module``.

    Returns:
        The ``PeftModel``; neither argument is changed.

    Raises:
        UserError: PEFT is missing, no adapters, or no plain LoRA of the original is exact.
    """
    peft = _peft()
    plain: dict[str, PlainLora] | None
    if original is None:
        pairs = {item: (module.get_parameter(item.a), module.get_parameter(item.b)) for item in find_adapters(module)}
        plain = {x.layer: PlainLora(a.detach(), b.detach(), x.scaling) for x, (a, b) in pairs.items()}
    else:
        plain = export_plain(module, original)
    if not plain:
        why = "has no adapters" if plain is not None else "moved its base too far for adapters of low rank; merge it"
        raise UserError(f"{type(module).__name__} {why}")
    prefix, whole = inner_prefix(module), trained_whole(module)
    base = _stripped(module) if original is None else copy.deepcopy(original)
    config = peft_config(module, plain)
    for name in ("peft_type", "base_model_name_or_path", "inference_mode"):
        del config[name]
    inner = base.get_submodule(prefix.rstrip(".")).requires_grad_(False) if prefix else base.requires_grad_(False)
    model = peft.get_peft_model(inner, peft.LoraConfig(**config, **_dropout(module)), adapter_name=NAME)
    made = model.get_base_model()
    for layer, item in plain.items():
        target = made.get_submodule(layer.removeprefix(prefix))
        target.lora_A[NAME].weight.copy_(item.a)
        target.lora_B[NAME].weight.copy_(item.b)
    for name in whole:
        head = made.get_submodule(name.removeprefix(prefix)).modules_to_save[NAME]
        head.load_state_dict(module.get_submodule(name).state_dict())
    return model.train(module.training)


def _dropout(module: nn.Module) -> dict[str, float]:
    """The adapters' dropout, which is one for all in PEFT."""
    rates = {
        float(getattr(d, "p", 0.0))
        for x in module.modules()
        if isinstance(x, LoraLinear)
        for d in x.lora_dropout.values()
    }
    return {"lora_dropout": max(rates, default=0.0)}


def _stripped(module: nn.Module) -> nn.Module:
    """A copy with the bases in place of the adapted layers."""
    found = copy.deepcopy(module)
    for name, layer in list(found.named_modules()):
        if isinstance(layer, LoraLinear):
            _put(found, name, layer.base_layer)
    return found


def _put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where ``name`` is."""
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, new)
