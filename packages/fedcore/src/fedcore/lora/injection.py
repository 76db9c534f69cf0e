"""Adapters on the linear layers of a model, by the ends of their names; all else is frozen but the head."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from polymodal.errors import UserError, did_you_mean
from polymodal.seeding import generator
from torch import Tensor, nn

from fedcore.adapters import find_adapters
from fedcore.lora.init import check_rank, kaiming_init, qr_init
from fedcore.lora.linear import LoraLinear, is_linear, is_transposed, sizes_of
from fedcore.spec import _head_name

__all__ = [
    "Init",
    "default_head",
    "default_targets",
    "head_layers",
    "head_parameters",
    "inject",
    "target_layers",
]

Init = Literal["kaiming", "qr", "qr_scaled"]
INITS = ("kaiming", "qr", "qr_scaled")
USUAL = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("q_lin", "v_lin"),
    ("qkv",),
    ("query_key_value",),
    ("c_attn",),
    ("in_proj",),
)
"""targets by what a model has, the first that is found in full"""
NEW = ("pre_classifier", "head_dist")
"""layers beside a classifier that are as new as it is: DistilBERT's and a distilled DeiT's"""
_HEAD = re.compile(r"^(.*?(?:^|\.)(?:head|fc|classifier|lm_head|out_proj_head))(?:\.|$)")


def inject(
    model: nn.Module,
    rank: int | Mapping[str, int],
    targets: Sequence[str] = (),
    head: Sequence[str] = (),
    scaling: float = 2.0,
    dropout: float = 0.0,
    init: Init = "kaiming",
    init_rms: float = 1e-4,
    seed: int = 0,
) -> nn.Module:
    """A copy of a model with adapters; its function is that of the model.

    Where an adapter starts depends on its layer's name and weight, its rank and the seed alone. A smaller rank starts
    with the first rows of A and columns of B of a larger one (scaled QR: but for the scale).

    Args:
        model: the base; it stays as it is.
        rank: r of all adapters, or by layer; a layer is named as in ``targets``.
        targets: layers that get an adapter: their names, or the ends of them (``query`` is every layer ``….query``).
            Default: the layers of ``rank``, else the usual ones (query and value, or what they are called), else
            every linear layer but the head.
        head: layers that are trained whole, named likewise. Default: the classifier, see ``default_head``.
        scaling: s in ``base + s B A``.
        dropout: on the adapters' input.
        init: ``kaiming`` (A random, B zero), ``qr`` (split of the weight), ``qr_scaled`` (of the size ``init_rms``).
        init_rms: root mean square entry of B A after ``qr_scaled``.
        seed: of ``kaiming``.

    Returns:
        The adapted model; only adapters and head require a gradient.

    Raises:
        UserError: a name that no layer has, a layer that takes no adapter (convolution, embedding, inside
            ``nn.MultiheadAttention``), a rank out of its range, BatchNorm, or adapters that are there already.

    Source: ILoRA (arXiv 2511.16069) 5.1; names as in PEFT.
    """
    if init not in INITS:
        raise UserError(f"init={init!r}; expected one of {', '.join(INITS)}")
    _refuse_model(model)
    adapted = copy.deepcopy(model).requires_grad_(False)
    layers: dict[str, nn.Module] = dict(adapted.named_modules())
    heads = head_layers(adapted, head)
    chosen = target_layers(adapted, tuple(targets) or (tuple(rank) if isinstance(rank, Mapping) else ()), head)
    if isinstance(rank, Mapping):
        _found(layers, tuple(rank), "rank")
    for name in chosen:
        layer, here = layers[name], _rank(rank, name)
        check_rank(here, *sizes_of(layer), name)
        factors = _start(layer, name, here, scaling, init, init_rms, seed)
        _replace(adapted, layer, LoraLinear(layer, here, scaling, dropout, factors=factors).train(layer.training))
    for name in heads:
        layers[name].requires_grad_(True)
    _leave_fast_paths(adapted)
    return adapted


def head_layers(model: nn.Module, head: Sequence[str] = ()) -> tuple[str, ...]:
    """The layers that ``inject`` trains whole, in the model's order; UserError where a name has no layer."""
    return _found(dict(model.named_modules()), head, "head") if head else default_head(model)


def head_parameters(model: nn.Module, head: Sequence[str] = ()) -> list[str]:
    """Names of all parameters of ``head_layers``."""
    tops = tuple(f"{name}." for name in head_layers(model, head))
    return [name for name, _ in model.named_parameters() if name.startswith(tops)]


def target_layers(model: nn.Module, targets: Sequence[str] = (), head: Sequence[str] = ()) -> list[str]:
    """The layers that ``inject`` puts adapters on, in the model's order.

    Raises:
        UserError: a name that no layer has, or a layer that takes no adapter.
    """
    layers: dict[str, nn.Module] = dict(model.named_modules())
    heads = head_layers(model, head)
    inside = {name for name in layers if any(name == top or name.startswith(f"{top}.") for top in heads)}
    wanted = tuple(targets) or default_targets(model, inside)
    chosen = [name for name in _found(layers, wanted, "targets") if name not in inside]
    if not chosen:
        raise UserError(f"targets {','.join(wanted)} lie in the head {','.join(heads)}, which is trained whole")
    for name in chosen:
        _refuse_layer(name, layers)
    return chosen


def default_targets(model: nn.Module, without: Iterable[str] = ()) -> tuple[str, ...]:
    """The first of the usual names that the model has, or all its linear layers; ``without``: layers to leave out."""
    out = {*without}
    linears = [n for n, x in model.named_modules() if is_linear(x) and n not in out]
    last = {name.rpartition(".")[2] for name in linears}
    for names in USUAL:
        if last.issuperset(names):
            return names
    attention = tuple(f"{n}." for n, x in model.named_modules() if isinstance(x, nn.MultiheadAttention))
    found = tuple(name for name in linears if not name.startswith(attention))
    if not found:
        raise UserError(f"{type(model).__name__} has no linear layer but its head; adapters need one")
    return found


def default_head(model: nn.Module) -> tuple[str, ...]:
    """The classifier: the module called ``head``, ``fc`` or ``classifier`` around the last linear layer, or that layer.

    Beside it, new layers that some models have in front of it or next to it.
    """
    last = _head_name(model).removesuffix(".weight")
    if not last:
        raise UserError(f"{type(model).__name__} has no linear layer; adapters go on linear layers")
    match = _HEAD.match(last)
    top = match[1] if match else last
    if isinstance(model.get_submodule(top), nn.Sequential):  # hidden layers of a network whose name says nothing
        top = last
    return (top, *(n for n, x in model.named_modules() if n.rpartition(".")[2] in NEW and isinstance(x, nn.Linear)))


# ---------------------------------------------------------------------------------------------- pieces


def _named(layers: Iterable[str], name: str) -> list[str]:
    """Layers called ``name`` or ``….name``."""
    return [layer for layer in layers if layer and (layer == name or layer.endswith(f".{name}"))]


def _found(layers: Mapping[str, nn.Module], names: Sequence[str], what: str) -> tuple[str, ...]:
    """The layers of all ``names``, in the model's order."""
    found: set[str] = set()
    for name in names:
        here = _named(layers, name)
        if not here:
            known = {n.rpartition(".")[2]: None for n, x in layers.items() if n and is_linear(x)}
            raise UserError(
                f"no layer is called {name} ({what}); {did_you_mean(name, known)}linear layers here end in "
                f"{', '.join(list(known)[:12]) or 'nothing: there are none'}"
            )
        found.update(here)
    return tuple(name for name in layers if name in found)


def _refuse_model(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats:
            raise UserError(
                f"{name or type(model).__name__} is {type(layer).__name__}, whose statistics move with every batch "
                "though the base is frozen; take a model with LayerNorm or GroupNorm"
            )
    there = find_adapters(model)
    if there:
        raise UserError(f"{there[0].layer} has an adapter already; give the base model")


def _refuse_layer(name: str, layers: Mapping[str, nn.Module]) -> None:
    layer = layers[name]
    if not is_linear(layer):
        kind = type(layer).__name__
        inner = [n for n, x in layers.items() if n.startswith(f"{name}.") and is_linear(x)]
        remedy = f"name linear layers, e.g. {inner[0]}" if inner else "name linear layers alone, by a longer end"
        raise UserError(f"target {name} is {kind}, which takes no adapter; {remedy}")
    around = [n for n, x in layers.items() if isinstance(x, nn.MultiheadAttention) and name.startswith(f"{n}.")]
    if around:
        raise UserError(
            f"target {name} lies in nn.MultiheadAttention, which reads its weight past the adapter; "
            "name layers outside of it, e.g. linear1,linear2"
        )


def _rank(rank: int | Mapping[str, int], name: str) -> int:
    """Rank of a layer; of several ends of its name that are given, the longest counts."""
    if not isinstance(rank, Mapping):
        return rank
    ends = [end for end in rank if _named([name], end)]
    if not ends:
        raise UserError(f"no rank for the target {name}; add it to the ranks")
    return rank[max(ends, key=len)]


def _start(
    layer: Any, name: str, rank: int, scaling: float, init: Init, rms: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Factors of a layer, whose weight becomes the base: a parameter of its own, in case it was tied to another."""
    weight: Tensor = layer.weight.detach()
    if init == "kaiming":
        out_features, in_features = sizes_of(layer)
        factors = kaiming_init(rank, in_features, out_features, generator(seed, "lora", name))
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        return factors
    turned = is_transposed(layer)
    base, a, b = qr_init(weight.mT if turned else weight, rank, scaling, rms if init == "qr_scaled" else None)
    layer.weight = nn.Parameter((base.mT if turned else base).contiguous(), requires_grad=False)
    return a, b


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is held."""
    for owner in list(model.modules()):
        if owner is new:
            continue
        for name, child in owner._modules.items():
            if child is old:
                owner._modules[name] = new


def _leave_fast_paths(model: nn.Module) -> None:
    """Keep torch's encoder from its fused evaluation, which reads the weights of its linear layers past adapters."""
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and find_adapters(layer):
            layer.activation_relu_or_gelu = 0
        if isinstance(layer, nn.TransformerEncoder) and find_adapters(layer):
            layer.use_nested_tensor = False
