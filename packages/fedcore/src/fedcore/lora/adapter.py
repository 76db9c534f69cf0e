"""Adapters as folders in PEFT's layout, written and read without PEFT; exact plain LoRA of a base that was split."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from polymodal.errors import UserError
from polymodal.files import write_bytes, write_json
from polymodal.paths import require_files
from safetensors.torch import save
from torch import Tensor, nn

from fedcore.adapters import AdapterInfo, find_adapters
from fedcore.lora.aggregate import aggregate_concat_qr
from fedcore.lora.init import leading_qr
from fedcore.lora.linear import is_linear, sizes_of
from fedcore.lora.state import PREFIX

__all__ = [
    "AdapterFolder",
    "PlainLora",
    "export_plain",
    "inner_prefix",
    "load_adapter",
    "merged_state",
    "peft_config",
    "read_adapter",
    "save_adapter",
    "trained_whole",
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXACT = 1e-6
"""largest error of an export, Frobenius norm, as a share of the weight's: rounding of float32"""
MOVING_STARTS = ("olora", "pissa", "corda", "loftq", "lora_ga", "mica")
"""``init_lora_weights`` of PEFT that change the base: such factors mean nothing without that base"""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlainLora:
    """What one layer adds to its original weight: ``scaling B A``.

    Args:
        a: (r, k).
        b: (d, r).
        scaling: s.
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Number r of rows of A."""
        return len(self.a)


# ------------------------------------------------------------------ out


@torch.no_grad()
def export_plain(module: nn.Module, original: nn.Module) -> dict[str, PlainLora] | None:
    """Adapters as plain LoRA of the original weights, by layer, exact up to rounding.

    Where the base was split by the start (``base = W - s B0 A0``), a layer's adapter is ``[B, B0] [A; -A0]`` of rank
    2 r; where nothing was taken from the base it is B A itself. A base that moved since (FLoRA, FedEx-LoRA,
    ``residual="fold"``) gets the rank of its move, as long as factors of that rank are smaller than the weight.

    Args:
        module: with adapters.
        original: the model that the adapters were put into.

    Returns:
        Adapters by layer; None where some layer has no such factors: its weights must be merged.

    Source: ILoRA's specification 3.8, as PEFT converts OLoRA.
    """
    found: dict[str, PlainLora] = {}
    for info in find_adapters(module):
        a, b = (module.get_parameter(name).detach() for name in (info.a, info.b))
        before, now = _weight(original.get_parameter(f"{info.layer}.weight"), info), _base(module, info)
        taken = before.double() - now.double()
        if not bool(taken.any()):
            found[info.layer] = PlainLora(a.clone(), b.clone(), info.scaling)
            continue
        factors = _low_rank(taken, info.rank, EXACT * float(torch.linalg.matrix_norm(before.double())))
        if factors is None:
            return None
        more_b, more_a = factors
        more_a = (more_a / -info.scaling).to(a)
        found[info.layer] = PlainLora(torch.cat([a, more_a]), torch.cat([b, more_b.to(b)], dim=1), info.scaling)
    return found


def _low_rank(matrix: Tensor, rank: int, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """Factors (d, r), (r, k) of a matrix to within ``tolerance``, of the given rank or the least possible."""
    left, right = leading_qr(matrix, min(rank, *matrix.shape))
    if float(torch.linalg.matrix_norm(matrix - left @ right)) <= tolerance:
        return left, right
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    rest = s.square().flip(0).cumsum(0).flip(0).sqrt()  # error of leaving out the i-th value and all after it
    needed = int((rest > tolerance).sum())
    if needed * sum(matrix.shape) >= matrix.numel():
        return None
    return u[:, :needed] * s[:needed], v[:needed]


def _weight(parameter: Tensor, info: AdapterInfo) -> Tensor:
    """(d, k), whichever way the layer stores it."""
    return parameter.detach().mT if info.transposed else parameter.detach()


def _base(module: nn.Module, info: AdapterInfo) -> Tensor:
    return _weight(module.get_parameter(info.base), info)


def inner_prefix(module: nn.Module) -> str:
    """What precedes the names of the model that a reader of adapters has: our wrappers are not part of it."""
    from fedcore.models.hf import HFImages, HFText

    return "model." if isinstance(module, HFText | HFImages) else ""


def trained_whole(module: nn.Module) -> list[str]:
    """Modules that are trained as they are, beside the adapters (the head)."""
    factors = {name for info in find_adapters(module) for name in (info.a, info.b)}
    names = [name for name, p in module.named_parameters() if p.requires_grad and name not in factors]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def save_adapter(folder: Path, module: nn.Module, plain: Mapping[str, PlainLora], base: str | None = None) -> None:
    """Write an adapter that PEFT loads onto the original model, with the layers that were trained whole.

    Args:
        folder: made where it is missing.
        module: with adapters, for the layers trained whole.
        plain: from ``export_plain``.
        base: folder or name of the original model, where there is one.

    Raises:
        UserError: disk full or folder not writable.
    """
    prefix, tensors = inner_prefix(module), {}
    for layer, item in plain.items():
        name = PREFIX + layer.removeprefix(prefix)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = item.a, item.b
    whole = trained_whole(module)
    for name in whole:
        for own, value in module.get_submodule(name).named_parameters():
            tensors[f"{PREFIX}{name.removeprefix(prefix)}.{own}"] = value.detach()
    folder.mkdir(parents=True, exist_ok=True)
    content = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, {"format": "pt"})
    write_bytes(folder / WEIGHTS, content)
    write_json(folder / CONFIG, {**peft_config(module, plain), "base_model_name_or_path": base})


def peft_config(module: nn.Module, plain: Mapping[str, PlainLora]) -> dict[str, Any]:
    """PEFT's configuration of these adapters and of the layers of ``module`` that are trained whole."""
    prefix = inner_prefix(module)
    whole = [name.removeprefix(prefix) for name in trained_whole(module)]
    ranks = {layer.removeprefix(prefix): item.rank for layer, item in plain.items()}
    alphas = {layer.removeprefix(prefix): _number(item.scaling * item.rank) for layer, item in plain.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {layer: value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {layer: value for layer, value in alphas.items() if value != alpha},
        "target_modules": targets_of(list(ranks), [name.removeprefix(prefix) for name, _ in module.named_modules()]),
        "modules_to_save": whole or None,
        "fan_in_fan_out": all(info.transposed for info in find_adapters(module)),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _number(value: float) -> float | int:
    """PEFT's alpha is a whole number where it can be."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value


def targets_of(layers: list[str], modules: Sequence[str]) -> list[str] | str:
    """``target_modules`` of PEFT that mean these layers alone: it takes every module whose name ends in one."""
    others = [name for name in modules if name not in layers and ".base_layer" not in name and ".lora_" not in name]
    if any(other.endswith(f".{layer}") for other in others for layer in layers):
        return f"({'|'.join(map(re.escape, layers))})"
    return layers


@torch.no_grad()
def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of the plain model with the adapters added to their bases; tied ones once."""
    prefix = inner_prefix(module)
    infos = {info.base: info for info in find_adapters(module)}
    known: set[int] = set()
    found = {}
    for name, value in module.state_dict().items():
        if ".lora_" in name or name.startswith("lora_") or (value.data_ptr() in known and value.numel()):
            continue
        known.add(value.data_ptr())
        if name in infos:
            info = infos[name]
            a, b = (module.get_parameter(factor).detach() for factor in (info.a, info.b))
            added = (info.scaling * (b.double() @ a.double())).to(value.dtype)
            value = value + (added.mT if info.transposed else added)
        found[name.replace(".base_layer.", ".").removeprefix(prefix)] = value.detach().cpu().contiguous()
    return found


# ------------------------------------------------------------------ in


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter that was read.

    Args:
        path: its folder.
        layers: adapters by layer, named as in the model that it was trained on.
        whole: tensors of layers that were trained whole, by name.
    """

    path: Path
    layers: dict[str, PlainLora]
    whole: dict[str, Tensor]

    def check(self, model: nn.Module) -> None:
        """Whether ``model`` has these layers, linear and of these shapes.

        Raises:
            UserError: it has not: the adapter is of another base.
        """
        prefix, named = inner_prefix(model), dict(model.named_modules())
        for name, item in self.layers.items():
            layer = named.get(prefix + name)
            if layer is None:
                raise UserError(
                    f"adapter {self.path} is of another base: this model has no layer {name}; give the model it was"
                    " trained on"
                )
            if not is_linear(layer):
                kind = type(layer).__name__
                raise UserError(f"adapter {self.path}: {name} is a {kind} here; only linear layers are adapted")
            shape, expected = sizes_of(layer), (len(item.b), item.a.shape[1])
            if shape != expected:
                raise UserError(
                    f"adapter {self.path} is of another base: {name} has a weight of {expected[0]}x{expected[1]} there,"
                    f" {shape[0]}x{shape[1]} here; give the model it was trained on"
                )

    def common_rank(self) -> int:
        """The largest rank of its layers that all of them can have."""
        most = min(min(len(item.b), item.a.shape[1]) for item in self.layers.values())
        return min(most, max(item.rank for item in self.layers.values()))


def read_adapter(path: Path) -> AdapterFolder:
    """A LoRA adapter of linear layers from a folder of PEFT.

    Raises:
        UserError: missing or broken files, or an adapter of another kind.
    """
    from polymodal.weights import load_tensors

    what, remedy = "PEFT adapter", "give a folder that save_pretrained wrote"
    path = path.expanduser()
    require_files(path, [CONFIG], what, remedy)
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind, rank = str(config.get("peft_type")), int(config.get("r", 8))
        alpha = float(config.get("lora_alpha", 8))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{what}: {path / CONFIG} cannot be read ({' '.join(str(error).split())}); {remedy}") from error
    if kind != "LORA":
        raise UserError(f"{what}: {path} is of kind {kind}; only LORA can be read")
    _refuse_variants(path, config)
    file = WEIGHTS if (path / WEIGHTS).is_file() or not (path / "adapter_model.bin").is_file() else "adapter_model.bin"
    require_files(path, [file], what, remedy)
    stored = load_tensors(path / file, remedy=remedy)
    tensors = {name.removeprefix(PREFIX): value.float() for name, value in stored.items()}
    pairs = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    layers = {}
    for name in (n for n in tensors if n.endswith(".lora_A.weight")):
        layer = name.removesuffix(".lora_A.weight")
        a, b = tensors[name], tensors.get(f"{layer}.lora_B.weight")
        if b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise UserError(f"{what}: {path}: the factors of {layer} are no pair of matrices; give linear layers alone")
        scale = float(_of_pattern(config.get("alpha_pattern"), layer, alpha))
        own = float(_of_pattern(config.get("rank_pattern"), layer, rank))
        layers[layer] = PlainLora(a, b, scale / (math.sqrt(own) if config.get("use_rslora") else own))
    other = sorted(name for name in tensors if "lora_" in name and name.rpartition(".lora_")[0] not in pairs)
    if other or not layers:
        has = other[0] if other else "no factors"
        raise UserError(f"{what}: {path} has {has}; only adapters of linear layers can be read")
    return AdapterFolder(path, layers, {name: value for name, value in tensors.items() if "lora_" not in name})


def _refuse_variants(path: Path, config: Mapping[str, Any]) -> None:
    """UserError where the factors are not all that the adapter adds to its base."""
    start = str(config.get("init_lora_weights", True)).lower()
    for bad, why in (
        (config.get("use_dora"), "is DoRA, which also scales the weight"),
        (config.get("lora_bias") or config.get("bias", "none") != "none", "also trains biases"),
        (
            start.startswith(MOVING_STARTS),
            f"began with {start}, which changes the base; save it with path_initial_model_for_weight_conversion",
        ),
    ):
        if bad:
            raise UserError(f"PEFT adapter: {path} {why}; only plain LoRA can be read")


def _of_pattern(pattern: Any, layer: str, default: float) -> float:
    """Value of the first pattern that means the layer, as PEFT looks it up."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return float(value)
    return default


@torch.no_grad()
def load_adapter(module: nn.Module, folder: AdapterFolder) -> None:
    """Set the factors of ``module``, and layers trained whole that have the same shape, to those of the adapter.

    A smaller rank gets the best approximation, a larger one the same product with directions to train.

    Args:
        module: with adapters on the layers of the folder; its base must be the original.
        folder: the adapter; what each layer adds stays the same at another scaling.
    """
    prefix = inner_prefix(module)
    for info in find_adapters(module):
        item = folder.layers[info.layer.removeprefix(prefix)]
        a, b = item.a, item.b * (item.scaling / info.scaling)
        if item.rank != info.rank:
            ((a, b),) = aggregate_concat_qr([(a, b)], [1.0], [info.rank], decomposition="svd")
        module.get_parameter(info.a).copy_(a)
        module.get_parameter(info.b).copy_(b)
    named = dict(module.named_parameters())
    for name, value in folder.whole.items():
        own = named.get(prefix + name)
        if own is None or own.shape != value.shape:
            log.warning("adapter %s: %s is not of this model's shape and stays new", folder.path, name)
        else:
            own.copy_(value)
