"""Layout of a model's trainable parameters in one flat vector, and what each tensor is for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fedcore.adapters import AdapterInfo, find_adapters

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
        heads: attention heads that divide the rows (0: not of an attention layer, unknown, or rows ordered otherwise).
            A fused qkv weight with heads has the rows of all queries first, then all keys, then all values.
        host: of an adapter: kind of the weight that it belongs to.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    kind: Kind
    heads: int = 0
    host: Kind | None = None

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
        starts: vectors (P_rank,) that these models came with, by rank; on a client's layout, of its own model alone.
        clients: number of clients in the federation by rank, on the server's layout only.
        adapters: low-rank adapters of linear layers.
    """

    params: tuple[ParamInfo, ...]
    dtype: torch.dtype = torch.float32
    frozen: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    ranks: dict[int, ParamSpec] = field(default_factory=dict, compare=False)
    starts: dict[int, Tensor] = field(default_factory=dict, compare=False)
    clients: dict[int, int] = field(default_factory=dict, compare=False)
    adapters: tuple[AdapterInfo, ...] = ()

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
            stop = start + parameter.numel()
            params.append(
                ParamInfo(name, tuple(parameter.shape), start, stop, *_use(name, parameter, owners[name], head))
            )
            start = stop
        if not params:
            raise ValueError("the model has no trainable parameter")
        if len(dtypes) > 1:
            raise ValueError(f"trainable parameters of several number formats: {', '.join(sorted(map(str, dtypes)))}")
        return cls(tuple(params), dtypes.pop(), tuple(frozen), tuple(tied), adapters=find_adapters(module))


class _Attention(NamedTuple):
    """What the nearest attention module around a parameter declares (0: nothing)."""

    heads: int = 0
    head_dim: int = 0
    ordered: bool = True
    """whether fused rows are ordered q, k, v with heads inside, rather than heads with q, k, v inside"""


class _Owner(NamedTuple):
    """Where a parameter lives: the module that holds it, its name there, the attention around it."""

    module: nn.Module
    own: str
    attention: _Attention


def _owners(module: nn.Module) -> dict[str, _Owner]:
    """Parameter name -> where it lives."""
    found: dict[str, _Owner] = {}

    def visit(owner: nn.Module, prefix: str, around: _Attention) -> None:
        around = _attention(owner) or around
        for own, _ in owner.named_parameters(recurse=False, remove_duplicate=False):
            found[prefix + own] = _Owner(owner, own, around)
        for name, child in owner.named_children():
            visit(child, f"{prefix}{name}.", around)

    # named_children hides a module that is reachable twice; parameters of the second path are the first's, tied.
    visit(module, "", _Attention())
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name not in found:
            same = next(other for other in found if module.get_parameter(other) is parameter)
            found[name] = found[same]
    return found


def _attention(module: nn.Module) -> _Attention | None:
    """Attention heads that the module itself declares."""
    heads = _declared(module, "num_heads", "num_attention_heads", "n_heads", "n_head")
    head_dim = _declared(module, "head_dim", "attention_head_size")
    # timm: MaxViT says head_first; LeViT, EfficientFormer and TinyViT, which declare key_dim, always are
    inside = getattr(module, "head_first", False) is True or hasattr(module, "key_dim")
    return _Attention(heads, head_dim, not inside) if heads or head_dim else None


def _declared(module: nn.Module, *names: str) -> int:
    """The first of these attributes that is a positive integer, or 0."""
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)


def _head_name(module: nn.Module) -> str:
    """Weight of the last linear layer that holds logits: ``head``, ``fc``, ``classifier``, or the last Linear."""
    linears = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    named = [n for n in linears if re.search(r"(^|\.)(head|fc|classifier|lm_head|out_proj_head)(\.|$)", n)]
    last = named[-1] if named else (linears[-1] if linears else "")
    return f"{last}.weight" if last or linears else ""


_PROJECTIONS: dict[str, Kind] = {
    **dict.fromkeys(("q", "query", "q_proj", "q_lin"), "query"),
    **dict.fromkeys(("k", "key", "k_proj", "k_lin"), "key"),
    **dict.fromkeys(("v", "value", "v_proj", "v_lin"), "value"),
    **dict.fromkeys(("qkv", "in_proj", "query_key_value", "c_attn"), "qkv"),
}
_HEADS_FIRST = ("query_key_value",)
"""fused weights of GPT-NeoX, BLOOM and Falcon: each head has its own q, k, v rows"""
_POSITION = re.compile(r"pos(ition)?_?(embed|emb)|embed_positions|relative_position_bias_table")
_TOKEN = re.compile(r"(cls|class|dist|mask|reg)_?token|class_embedding")
_ADAPTER = re.compile(r"(?:^|\.)([^.]*)\.?lora_?([AB])")
_LAYERS: tuple[tuple[type | tuple[type, ...], Kind], ...] = (
    ((nn.Embedding, nn.EmbeddingBag), "embedding"),
    (nn.Linear, "linear"),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"),
)


def _use(name: str, parameter: Tensor, owner: _Owner, head: str) -> tuple[Kind, int, Kind | None]:
    """What a tensor is for, the heads that divide its rows, and the kind of an adapter's host."""
    layer = name.rsplit(".", 2)[-2] if "." in name else ""
    adapter = _ADAPTER.search(name)
    if adapter:
        kind: Kind = "lora_a" if adapter[2] == "A" else "lora_b"
        host, heads = _projection(adapter[1], parameter, owner.attention)
        return kind, heads if kind == "lora_b" else 0, host or "linear"
    named = layer if isinstance(owner.module, nn.Embedding) else owner.own
    if _POSITION.search(named):
        return "position", 0, None
    if _TOKEN.search(owner.own):
        return "token", 0, None
    if parameter.ndim < 2:
        return "vector", 0, None
    if name == head:
        return "head", 0, None
    found = next((kind for types, kind in _LAYERS if isinstance(owner.module, types)), None)
    projection, heads = _projection(
        owner.own.removesuffix("_weight") if found is None else layer, parameter, owner.attention
    )
    if projection is None and found is None:
        projection, heads = _projection(layer, parameter, owner.attention)[0], 0  # GPT-2's weights are (in, out)
    return projection or found or "other", heads, None


def _projection(layer: str, parameter: Tensor, attention: _Attention) -> tuple[Kind | None, int]:
    """Kind of an attention projection by the name of its layer (None: not one), and the heads that divide its rows."""
    kind = _PROJECTIONS.get(layer)
    if kind is None or not (attention.heads or attention.head_dim):
        return None, 0
    rows, heads = parameter.shape[0], attention.heads
    if kind == "qkv":
        known = attention.ordered and layer not in _HEADS_FIRST and heads
        whole = rows == 3 * heads * attention.head_dim if attention.head_dim else known and rows % (3 * heads) == 0
        return kind, heads if known and whole else 0
    if attention.head_dim and rows % attention.head_dim == 0:  # keys may have fewer heads than queries
        heads = rows // attention.head_dim
    return kind, heads if heads and rows % heads == 0 else 0
