"""What methods on low-rank adapters share: the local optimizer, uploads that fit, averages of factors and heads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from polymodal.errors import UserError
from torch import Tensor

from fedcore.algorithm import Algorithm, Client, Context, GradFn, Local, RoundLr, Step, Tree, clip_norm
from fedcore.algorithms._lora_layout import Factors, Layout, Part, fixed_shapes, padded_mean, times, weighted_sum
from fedcore.ops.adam import adam_step_, moment_dtype

if TYPE_CHECKING:
    from fedcore.spec import ParamSpec

__all__ = ["LoraAlgorithm"]

log = logging.getLogger(__name__)


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
            if len(layout.layers) != len(own.layers) or fixed_shapes(layout) != fixed_shapes(own):
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
            item.view(new).copy_(weighted_sum(found))
        return new, self.merge(server, params, new, parts, ctx)

    # ------------------------------------------------------------------ for subclasses

    def scaled(self, part: Part, index: int) -> Factors:
        """Factors of a layer whose product, times the server's scaling, is the client's ``s B A``.

        A factor that did not travel is empty.
        """
        layer, none = part.layout.layers[index], torch.empty(0)
        a, b = part.upload.get(layer.a.name, none), part.upload.get(layer.b.name, none)
        return times(a, layer.scaling / self.own.layers[index].scaling), b

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
