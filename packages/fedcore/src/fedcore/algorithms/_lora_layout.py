"""Adapters of unequal ranks in flat vectors: where they are, how they are cut to a smaller rank, averaged, matched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from polymodal.errors import UserError
from torch import Tensor

from fedcore.algorithm import Tree
from fedcore.ops.adam import moment_dtype
from fedcore.spec import ParamInfo

if TYPE_CHECKING:
    from fedcore.spec import ParamSpec

__all__ = ["Factors", "Layer", "Layout", "Part", "fixed_shapes", "padded_mean", "times", "weighted_sum"]

Factors = tuple[Tensor, Tensor]
"""A (r, k) and B (d, r) of one layer."""


class Layer(NamedTuple):
    """An adapted layer in the vector of a model of one rank.

    Args:
        a: place of A (r, k).
        b: place of B (d, r).
        base: name of the frozen weight.
        rank: r.
        scaling: s in ``base + s B A``.
        transposed: whether the frozen weight is stored (k, d).
    """

    a: ParamInfo
    b: ParamInfo
    base: str
    rank: int
    scaling: float
    transposed: bool

    def factors(self, flat: Tensor) -> Factors:
        """Views of A and B in a vector (..., P)."""
        return self.a.view(flat), self.b.view(flat)


@dataclass(frozen=True)
class Layout:
    """Adapters and tensors trained whole (the head) of a model of one rank.

    Args:
        spec: of its vector.
        layers: adapted layers.
        whole: all other trainable tensors.
    """

    spec: ParamSpec
    layers: tuple[Layer, ...]
    whole: tuple[ParamInfo, ...]

    @classmethod
    def of(cls, spec: ParamSpec) -> Layout:
        """The layout of a model's vector.

        Raises:
            UserError: no adapters, or adapters that are frozen.
        """
        if not spec.adapters:
            raise UserError("the model has no low-rank adapters on linear layers; give ranks, e.g. --lora.ranks 2,4,6")
        infos = {item.name: item for item in spec}
        layers = []
        for found in spec.adapters:
            if found.a not in infos or found.b not in infos:
                raise UserError(f"the adapter of {found.layer} is frozen; make its factors A and B trainable")
            layers.append(
                Layer(infos[found.a], infos[found.b], found.base, found.rank, found.scaling, found.transposed)
            )
        adapted = {item.name for layer in layers for item in (layer.a, layer.b)}
        return cls(spec, tuple(layers), tuple(item for item in spec if item.name not in adapted))

    @cached_property
    def sides(self) -> dict[str, tuple[ParamInfo, ...]]:
        """Places of all A as ``a``, of all B as ``b``."""
        return {"a": tuple(layer.a for layer in self.layers), "b": tuple(layer.b for layer in self.layers)}

    def spans(self, sides: str) -> list[tuple[int, int]]:
        """Spans of the factors named in ``sides``: "", "a", "b" or "ab"."""
        return [(item.start, item.stop) for side in sides for item in self.sides[side]]

    def without(self, sides: str) -> list[ParamInfo]:
        """All tensors but the factors named in ``sides``, in the order of the vector."""
        left_out = {item.name for side in sides for item in self.sides[side]}
        return [item for item in self.spec if item.name not in left_out]

    def cut(self, flat: Tensor, small: Layout, gradient: bool = False) -> Tensor:
        """The vector of a model of a smaller rank: first rows of A, first columns of B, the rest as it is.

        Where scalings differ, A is changed so that ``s B A`` stays; the gradient by A changes the other way.

        Args:
            flat: (P,) of this layout.
            small: the other layout.
            gradient: whether ``flat`` is a gradient rather than a point.
        """
        if small is self:
            return flat
        new = flat.new_empty(small.spec.numel)
        for big, layer in zip(self.layers, small.layers, strict=True):
            (a, b), ratio = big.factors(flat), big.scaling / layer.scaling
            layer.a.view(new).copy_(times(a[: layer.rank], 1 / ratio if gradient else ratio))
            layer.b.view(new).copy_(b[:, : layer.rank])
        for mine, its in zip(self.whole, small.whole, strict=True):
            its.view(new).copy_(mine.view(flat))
        return new


class Part(NamedTuple):
    """One upload that can be used.

    Args:
        client: id.
        weight: of its upload; all add up to one.
        rank: key of the client's layout in ``spec.ranks``.
        layout: of the client's model.
        upload: tensors by parameter name.
    """

    client: int
    weight: float
    rank: int
    layout: Layout
    upload: Tree

    def raw(self, index: int) -> Factors:
        """A and B of a layer as the client has them."""
        layer = self.layout.layers[index]
        return self.upload[layer.a.name], self.upload[layer.b.name]


def padded_mean(found: Sequence[tuple[float, Tensor]], old: Tensor, dim: int) -> Tensor:
    """Sum of weighted tensors, each filled up with zeros along ``dim`` to the size of ``old``, in float32 or more.

    Rows (or columns) that no tensor has stay as in ``old``: as zeros they could never be trained again, since the
    gradient by A vanishes with B and the other way round.
    """
    new = old.to(torch.promote_types(old.dtype, torch.float32), copy=True)
    new.narrow(dim, 0, max(value.shape[dim] for _, value in found)).zero_()
    for weight, value in found:
        new.narrow(dim, 0, value.shape[dim]).add_(value, alpha=weight)
    return new


def weighted_sum(found: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Sum of weighted tensors in float32 or more."""
    total = torch.zeros_like(found[0][1], dtype=moment_dtype(found[0][1].dtype))
    for weight, value in found:
        total.add_(value, alpha=weight)
    return total


def times(tensor: Tensor, ratio: float) -> Tensor:
    """The product; the tensor itself where the ratio is one."""
    return tensor if ratio == 1.0 else tensor * ratio


def fixed_shapes(layout: Layout) -> list[tuple[int, ...]]:
    """Shapes that do not depend on the rank."""
    return [(*layer.a.shape[1:], layer.b.shape[0]) for layer in layout.layers] + [item.shape for item in layout.whole]
