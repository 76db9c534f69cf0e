"""Layout of a model's trainable parameters in one flat vector, and what each tensor is for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Kind", "ParamInfo", "ParamSpec"]

Kind = Literal[
    "linear",
    "conv",
    "query",
    "key",
    "value",
    "qkv",
    "embedding",
    "position",
    "token",
    "head",
    "lora_a",
    "lora_b",
    "vector",
    "other",
]
"""``token``: class tokens and the like; ``head``: the last linear layer; ``vector``: biases, norms, everything 1-D."""


@dataclass(frozen=True)
class ParamInfo:
    """One trainable tensor.

    Args:
        name: as in ``named_parameters()``; tied tensors appear once, under their first name.
        shape: of the tensor.
        start: first index in the flat vector.
        stop: one past the last.
        kind: what it is for, found from its module, never from the name alone.
        heads: attention heads (0: not of an attention layer, or unknown).
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    kind: Kind
    heads: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    def view(self, flat: Tensor) -> Tensor:
        """The tensor (..., *shape) as a view of a flat vector (..., P)."""
        return flat[..., self.start : self.stop].reshape(*flat.shape[:-1], *self.shape)


@dataclass(frozen=True)
class ParamSpec:
    """All trainable tensors of a model in the order of the flat vector.

    Args:
        params: the tensors.
        dtype: of the flat vector (all trainable parameters must have it).
        frozen: names of parameters that are not trained.
        tied: further names of tied tensors -> first name.
        ranks: layouts of the clients' models by adapter rank, on the server's layout only.
    """

    params: tuple[ParamInfo, ...]
    dtype: torch.dtype = torch.float32
    frozen: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    ranks: dict[int, ParamSpec] = field(default_factory=dict, compare=False)

    def __iter__(self) -> Iterator[ParamInfo]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)

    @cached_property
    def numel(self) -> int:
        """P, the length of the flat vector."""
        return self.params[-1].stop if self.params else 0

    def info(self, name: str) -> ParamInfo:
        """The tensor called ``name``; KeyError where there is none."""
        for item in self.params:
            if item.name == name:
                return item
        raise KeyError(name)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector (..., P) by name."""
        return {item.name: item.view(flat) for item in self.params}

    def flatten(self, tensors: dict[str, Tensor]) -> Tensor:
        """A new flat vector (P,) from tensors by name."""
        return torch.cat([tensors[item.name].reshape(-1) for item in self.params])

    @classmethod
    def from_module(cls, module: nn.Module) -> ParamSpec:
        """Layout of the trainable parameters of ``module``.

        Raises:
            ValueError: no trainable parameter, or trainable parameters of several number formats.
        """
        owners = _owners(module)
        first: dict[int, str] = {}
        tied: list[tuple[str, str]] = []
        frozen: list[str] = []
        params: list[ParamInfo] = []
        head, start, dtypes = _head_name(module), 0, set()
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if id(parameter) in first:
                tied.append((name, first[id(parameter)]))
                continue
            first[id(parameter)] = name
            if not parameter.requires_grad:
                frozen.append(name)
                continue
            dtypes.add(parameter.dtype)
            kind, heads = _kind(name, parameter, *owners[name], head)
            stop = start + parameter.numel()
            params.append(ParamInfo(name, tuple(parameter.shape), start, stop, kind, heads))
            start = stop
        if not params:
            raise ValueError("the model has no trainable parameter")
        if len(dtypes) > 1:
            raise ValueError(f"trainable parameters of several number formats: {', '.join(sorted(map(str, dtypes)))}")
        return cls(tuple(params), dtypes.pop(), tuple(frozen), tuple(tied))


def _owners(module: nn.Module) -> dict[str, tuple[nn.Module, str, int]]:
    """Parameter name -> (module that holds it, its own name there, attention heads of that module or its parents)."""
    found: dict[str, tuple[nn.Module, str, int]] = {}

    def visit(owner: nn.Module, prefix: str, heads: int) -> None:
        heads = _heads(owner) or heads
        for own, _ in owner.named_parameters(recurse=False, remove_duplicate=False):
            found[prefix + own] = (owner, own, heads)
        for name, child in owner.named_children():
            visit(child, f"{prefix}{name}.", heads)

    # named_children hides a module that is reachable twice; parameters of the second path are the first's, tied.
    visit(module, "", 0)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name not in found:
            same = next(other for other in found if module.get_parameter(other) is parameter)
            found[name] = found[same]
    return found


def _heads(module: nn.Module) -> int:
    """Attention heads that the module itself declares."""
    for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
        value = getattr(module, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _head_name(module: nn.Module) -> str:
    """Weight of the last linear layer that holds logits: ``head``, ``fc``, ``classifier``, or the last Linear."""
    linears = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    named = [n for n in linears if re.search(r"(^|\.)(head|fc|classifier|lm_head|out_proj_head)(\.|$)", n)]
    last = named[-1] if named else (linears[-1] if linears else "")
    return f"{last}.weight" if last or linears else ""


_BY_NAME: tuple[tuple[str, Kind], ...] = (
    (r"lora_?A", "lora_a"),
    (r"lora_?B", "lora_b"),
    (r"pos(ition)?_?(embed|emb)", "position"),
    (r"(cls|class|dist|mask|reg)_?token|class_embedding", "token"),
)
_PROJECTIONS: dict[str, Kind] = {
    **dict.fromkeys(("q", "query", "q_proj", "q_lin"), "query"),
    **dict.fromkeys(("k", "key", "k_proj", "k_lin"), "key"),
    **dict.fromkeys(("v", "value", "v_proj", "v_lin"), "value"),
    **dict.fromkeys(("qkv", "query_key_value", "c_attn"), "qkv"),
}


def _kind(name: str, parameter: Tensor, owner: nn.Module, own: str, heads: int, head: str) -> tuple[Kind, int]:
    """What a tensor is for, and the heads that divide it."""
    for pattern, kind in _BY_NAME:
        if re.search(pattern, name):
            return kind, heads if kind == "lora_b" else 0
    if parameter.ndim < 2:
        return "vector", 0
    if name == head:
        return "head", 0
    if own == "in_proj_weight":
        return "qkv", heads
    projection = _PROJECTIONS.get(name.rsplit(".", 2)[-2] if "." in name else "")
    if projection and heads:
        return projection, heads
    kinds: tuple[tuple[type | tuple[type, ...], Kind], ...] = (
        ((nn.Embedding, nn.EmbeddingBag), "embedding"),
        (nn.Linear, "linear"),
        ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"),
    )
    return next((kind for types, kind in kinds if isinstance(owner, types)), "other"), 0
