"""What methods on low-rank adapters share: layouts of unequal ranks, the local optimizer, uploads that fit, means."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import torch
from polymodal.errors import UserError
from torch import Tensor

from fedcore.algorithm import Algorithm, Client, Context, GradFn, Local, RoundLr, Step, Tree, clip_norm
from fedcore.ops.adam import adam_step_, moment_dtype
from fedcore.spec import ParamInfo

if TYPE_CHECKING:
    from fedcore.spec import ParamSpec

__all__ = ["Factors", "Layer", "Layout", "LoraAlgorithm", "Part", "padded_mean"]

log = logging.getLogger(__name__)

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
            layer.a.view(new).copy_(_times(a[: layer.rank], 1 / ratio if gradient else ratio))
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


@dataclass(frozen=True, kw_only=True)
class LoraAlgorithm(Algorithm):
    """Base of all methods on adapters: clients train A, B and the head by AdamW or SGD with a new state each round.

    The server's vector is that of the largest rank. A client of rank r is sent the first r rows of A and columns of B,
    in round 0 what its own model came with. Tensors that are trained whole are averaged. Uploads of a wrong shape or
    with values that are not finite are left out with a warning, and the other weights rescaled. Where scalings s_k
    differ, aggregates are of ``s_k B_k A_k``, divided by the receiver's s.

    The papers weigh clients by samples: ``weighting="samples"`` of the simulation, as the presets have it.

    Args:
        optimizer: ``adamw`` (decay beside the gradient), or ``sgd`` with momentum (decay as part of the gradient).
        b1: share of the old first moment of ``adamw``.
        b2: share of the old second moment of ``adamw``.
        eps: added to the root of the second moment of ``adamw``.
        momentum: of ``sgd``.
    """

    reduction: ClassVar[Literal["mean", "sum", "list"]] = "list"
    adapters: ClassVar[bool] = True
    default_init: ClassVar[str] = "kaiming"
    """how adapters start where the user leaves it open (``lora.init=auto``)"""
    equal_ranks: ClassVar[bool] = False
    """whether all clients need the same rank"""
    unsent: ClassVar[str] = ""
    """factors that clients have by themselves: they do not travel down"""

    lr: float = 1e-3
    round_lr: RoundLr = "constant"
    weight_decay: float = 0.0
    clip_grad: float = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9

    own: ClassVar[Any] = None
    """``Layout`` of the model after ``bind``; on the server, of the largest rank"""
    layouts: ClassVar[dict[int, Layout]] = {}
    """on the server: layouts by rank"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("optimizer", self.optimizer in ("adamw", "sgd"), "adamw or sgd")
        for name in ("b1", "b2", "momentum"):
            self.check(name, 0 <= getattr(self, name) < 1, f"0 <= {name} < 1")
        self.check("eps", self.eps > 0, "more than 0")

    # ------------------------------------------------------------------ what methods differ in

    def still(self, round: int) -> str:
        """Factors that are not trained in a round, "", "a", "b" or "ab": they do not travel up."""
        return ""

    def home(self, round: int) -> Tensor:
        """(P,) of this client's model where it gets it by itself, see ``unsent``."""
        start: Tensor = next(iter(self.spec.starts.values()))
        return start

    def adjusted(self, params: Tensor, grad: Tensor, local: Local) -> Tensor:
        """What the optimizer is given for the clipped gradient (..., P), which may be changed."""
        return grad

    def merge(self, server: Tree, params: Tensor, new: Tensor, parts: Sequence[Part], ctx: Context) -> Tree:
        """Write the new factors into ``new`` (P,), whose head is done; return the new server state.

        The default averages each factor by itself.
        """
        for index, layer in enumerate(self.own.layers):
            for item, dim in ((layer.a, 0), (layer.b, 1)):
                if item.name in parts[0].upload:
                    found = [(part.weight, self.scaled(part, index)[dim]) for part in parts]
                    item.view(new).copy_(padded_mean(found, item.view(params), dim))
        return server

    # ------------------------------------------------------------------ once

    def bind(self, spec: ParamSpec) -> Self:
        """Find the adapters.

        Raises:
            UserError: a model without adapters, or unequal ranks where the method needs equal ones.
        """
        bound = super().bind(spec)
        own = Layout.of(spec)
        layouts = {rank: Layout.of(other) for rank, other in spec.ranks.items()}
        if layouts:  # the same object for the largest rank, whose vector needs no cutting
            layouts[max(layouts)] = own
        if self.equal_ranks and len(layouts) > 1:
            raise UserError(
                f"{type(self).__name__} needs clients of one rank, not {', '.join(map(str, sorted(layouts)))}; "
                f"give one, e.g. --lora.ranks {max(layouts)}, or choose ilora, flexlora or fedit"
            )
        for layout in layouts.values():
            if len(layout.layers) != len(own.layers) or _shapes(layout) != _shapes(own):
                raise UserError("models of different ranks must have the same adapted layers and the same head")
        object.__setattr__(bound, "own", own)
        object.__setattr__(bound, "layouts", layouts)
        return bound

    # ------------------------------------------------------------------ a round

    def sent(self, params: Tensor, rank: int, round: int) -> Tensor:
        """(P_rank,) where clients of a rank start a round."""
        vector: Tensor = self.spec.starts[rank] if round == 0 else self.own.cut(params, self.layouts[rank])
        return vector

    def broadcast(self, server: Tree, params: Tensor, ctx: Context, client: Client) -> tuple[Tensor, Tree]:
        """The model cut to the client's rank, without factors that it has by itself."""
        vector = self.sent(params, client.rank, ctx.round)
        if not self.unsent:
            return vector, {}
        items = self.layouts[client.rank].without(self.unsent)
        return torch.cat([vector.new_empty(0), *(vector[item.start : item.stop] for item in items)]), {}

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[..., Tensor]
    ) -> tuple[Tensor, Local]:
        """The model received, with the factors that did not travel."""
        if not self.unsent:
            return params, Local()
        start, at = self.home(ctx.round).clone(), 0
        for item in self.own.without(self.unsent):
            start[item.start : item.stop] = params[at : at + item.numel]
            at += item.numel
        return start, Local()

    def local_step(self, params: Tensor, grad_fn: GradFn, batch: Any, local: Local, step: Step) -> tuple[Tensor, Local]:
        """One step of AdamW or SGD; factors that are still, and tensors without a gradient, stay as they are."""
        grad, _ = grad_fn(params, batch, rng=step.rng)
        still = self.own.spans(self.still(step.round))
        for start, stop in still:
            grad[..., start:stop] = 0
        grad = self.adjusted(params, clip_norm(grad, self.clip_grad), local)
        if step.k == 0:
            for name in ("m", "v") if self.optimizer == "adamw" else ("m",):
                local.own[name] = torch.zeros_like(grad, dtype=moment_dtype(grad.dtype))
        moved = [params, *(local.own[name] for name in ("m", "v") if name in local.own)]
        held = (*(still if self.weight_decay else ()), *grad_fn.missing)  # without decay, no gradient is no move
        spared = [value[..., start:stop] for start, stop in held for value in moved]
        before = [view.clone() for view in spared]
        self._advance(params, grad, local, step)
        for view, values in zip(spared, before, strict=True):
            view.copy_(values)
        return params, local

    def _advance(self, params: Tensor, grad: Tensor, local: Local, step: Step) -> None:
        """Move ``params`` in place."""
        if self.optimizer == "adamw":
            k, decay = step.k + 1, step.lr * self.weight_decay
            c1, c2 = 1 - self.b1**k, 1 - self.b2**k
            numbers = {"b1": self.b1, "b2": self.b2, "eps": self.eps, "c1": c1, "c2": c2, "decay": decay}
            adam_step_(params, grad, local.own["m"], local.own["v"], rate=step.lr, **numbers)
            return
        if self.weight_decay:
            grad.add_(params, alpha=self.weight_decay)
        params.sub_(local.own["m"].mul_(self.momentum).add_(grad), alpha=step.lr)

    def local_finish(
        self, start: Tensor, params: Tensor, message: Tree, state: Tree, local: Local, ctx: Context
    ) -> tuple[Tree, Tree]:
        """All that was trained, by parameter name."""
        items = self.own.without(self.still(ctx.round))
        return {item.name: item.view(params).clone(memory_format=torch.contiguous_format) for item in items}, state

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Averages of what is trained whole, and what the method makes of the factors."""
        parts = self.usable(reduced, ctx.round)
        new = params.clone()
        for item in self.own.whole:
            found = [(part.weight, part.upload[item.name]) for part in parts]
            item.view(new).copy_(_mean(found))
        return new, self.merge(server, params, new, parts, ctx)

    # ------------------------------------------------------------------ for subclasses

    def scaled(self, part: Part, index: int) -> Factors:
        """Factors of a layer whose product, times the server's scaling, is the client's ``s B A``.

        A factor that did not travel is empty.
        """
        layer, none = part.layout.layers[index], torch.empty(0)
        a, b = part.upload.get(layer.a.name, none), part.upload.get(layer.b.name, none)
        return _times(a, layer.scaling / self.own.layers[index].scaling), b

    def usable(self, reduced: Iterable[tuple[int, float, Tree]], round: int) -> list[Part]:
        """The uploads that fit a client's layout and are finite, with weights that add up to one.

        Raises:
            RoundError: none is left.
        """
        parts, reasons = [], []
        for client, weight, upload in reduced:
            rank, reason = self._rank_of(upload, round)
            if reason:
                log.warning("round %d: upload of client %s left out: %s", round, client, reason)
                reasons.append(reason)
            else:
                parts.append(Part(client, weight, rank, self.layouts[rank], upload))
        if not parts:
            from fedcore.simulation import RoundError

            raise RoundError(f"round {round}: no upload can be used; first: {(reasons or ['there is none'])[0]}")
        if reasons:
            total = sum(part.weight for part in parts)
            parts = [part._replace(weight=part.weight / total) for part in parts]
        return parts

    def _rank_of(self, upload: Tree, round: int) -> tuple[int, str]:
        """Rank of the client that an upload is from, or why it cannot be used."""
        for rank, layout in self.layouts.items():
            items = layout.without(self.still(round))
            if all(item.name in upload and tuple(upload[item.name].shape) == item.shape for item in items):
                bad = next((name for name, value in upload.items() if not bool(value.isfinite().all())), "")
                return rank, f"{bad} is not finite" if bad else ""
        return 0, f"its shapes are those of no rank of {', '.join(map(str, sorted(self.layouts)))}"


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


def _mean(found: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Sum of weighted tensors in float32 or more."""
    total = torch.zeros_like(found[0][1], dtype=moment_dtype(found[0][1].dtype))
    for weight, value in found:
        total.add_(value, alpha=weight)
    return total


def _times(tensor: Tensor, ratio: float) -> Tensor:
    return tensor if ratio == 1.0 else tensor * ratio


def _shapes(layout: Layout) -> list[tuple[int, ...]]:
    """Shapes that do not depend on the rank."""
    return [(*layer.a.shape[1:], layer.b.shape[0]) for layer in layout.layers] + [item.shape for item in layout.whole]
