"""Low-rank adapters of a model: which layers have one, of what rank and scaling. PEFT's layers and ours alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["AdapterInfo", "find_adapters"]


@dataclass(frozen=True)
class AdapterInfo:
    """One adapted layer, ``y = base x + scaling B (A x)``.

    Args:
        layer: name of the module that holds the adapter.
        a: name of the parameter A (rank, in_features).
        b: name of the parameter B (out_features, rank).
        base: name of the weight under the adapter.
        rank: r.
        scaling: s (alpha / r in PEFT).
        out_features: d.
        in_features: k.
        transposed: whether the weight is stored (k, d), as GPT-2's ``Conv1D`` does, rather than (d, k).
    """

    layer: str
    a: str
    b: str
    base: str
    rank: int
    scaling: float
    out_features: int
    in_features: int
    transposed: bool = False


def find_adapters(module: nn.Module) -> tuple[AdapterInfo, ...]:
    """Adapters of linear layers in ``module``, in its order; those of convolutions and embeddings are left out."""
    found = []
    named: Any = module.named_modules()
    for name, layer in named:
        base = getattr(layer, "base_layer", None)
        adapters = getattr(layer, "lora_A", None)
        if base is None or not isinstance(adapters, Mapping | nn.ModuleDict) or not len(adapters):
            continue
        adapter = _active(layer, list(adapters))
        pair: Any = adapters, layer.lora_B
        a, b = (side[adapter].weight for side in pair)
        if a.ndim != 2 or b.ndim != 2:
            continue
        prefix = f"{name}." if name else ""
        found.append(
            AdapterInfo(
                name,
                f"{prefix}lora_A.{adapter}.weight",
                f"{prefix}lora_B.{adapter}.weight",
                f"{prefix}base_layer.weight",
                a.shape[0],
                float(layer.scaling[adapter]),
                b.shape[0],
                a.shape[1],
                tuple(base.weight.shape) != (b.shape[0], a.shape[1]) or type(base).__name__ == "Conv1D",
            )
        )
    return tuple(found)


def _active(layer: Any, names: list[str]) -> str:
    """The adapter that the layer uses: PEFT's active one, or the only one."""
    active = getattr(layer, "active_adapters", None) or names
    return next((name for name in active if name in names), names[0])
