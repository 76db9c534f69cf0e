"""What all methods with Adam on the clients share: the local step, and moments and direction that travel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from fedcore.algorithm import Algorithm, Client, Context, GradFn, Local, RoundLr, Step, Tree, clip_norm
from fedcore.ops.adam import adam_step_, moment_dtype

if TYPE_CHECKING:
    from fedcore.spec import ParamSpec

__all__ = ["AdamFamily", "Moment"]

Moment = Literal["m", "v"]


@dataclass(frozen=True, kw_only=True)
class AdamFamily(Algorithm):
    """Adam on the clients; the base of its federated forms.

    A local step is ``theta <- (1 - eta lambda) theta - eta (w A + u D)``: A is Adam's step from the clipped gradient,
    D the direction of the last global move, ``-mean_i(Delta_i) / (K eta)`` of the round before, where K is the mean
    over the clients that reported. Moments that are ``carried`` start the round from the mean of those that the clients
    ended the last one with; the others from zero. t counts steps over rounds, the largest K of the cohort each round.

    A tensor that receives no gradient in a step is left as it is, with its moments, as by ``torch.optim.AdamW``.

    Args:
        b1: share of the old first moment.
        b2: share of the old second moment.
        eps: added to the root of the second moment.
        no_decay_1d: leave biases, norms and everything 1-D out of the weight decay (official: all are decayed).
    """

    coupled: ClassVar[bool] = False
    """whether decay enters the gradient (L2), instead of shrinking the parameters"""

    lr: float = 3e-4
    round_lr: RoundLr = "cosine"
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    no_decay_1d: bool = False

    _decayed: ClassVar[tuple[tuple[int, int], ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("b1", 0 <= self.b1 < 1, "0 <= b1 < 1")
        self.check("b2", 0 <= self.b2 < 1, "0 <= b2 < 1")
        self.check("eps", self.eps > 0, "more than 0")

    # ------------------------------------------------------------------ what the forms differ in

    @property
    def carried(self) -> tuple[Moment, ...]:
        """Moments that travel between clients and server."""
        return ()

    @property
    def weights(self) -> tuple[float, float]:
        """Weight w of Adam's step and u of the direction."""
        return 1.0, 0.0

    @property
    def directed(self) -> bool:
        """Whether clients are sent D."""
        return self.weights[1] > 0

    @property
    def clocked(self) -> bool:
        """Whether clients are sent t."""
        return bool(self.carried)

    def corrections(self, k: int, t: int) -> tuple[float, float]:
        """Bias corrections of m and v in the k-th step of the round, the t-th of all: t for moments that are carried.

        Args:
            k: from 1.
            t: from 1.
        """
        return 1 - self.b1 ** (t if "m" in self.carried else k), 1 - self.b2 ** (t if "v" in self.carried else k)

    def adjusted(self, grad: Tensor, local: Local, step: Step) -> Tensor:
        """What Adam is given for the clipped gradient (..., P), which may be changed."""
        return grad

    def pack(self, moment: Tensor) -> Tensor:
        """How a moment (..., P) travels."""
        return moment

    def packed_size(self) -> int:
        """Numbers of a moment that travels."""
        return int(self.spec.numel)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """A new vector of the shape of ``like`` from what ``pack`` made, without client dimension."""
        return packed.expand_as(like).clone()

    def advance(self, params: Tensor, grad: Tensor, local: Local, **options: float) -> None:
        """Adam's step in place, see ``adam_step_``."""
        adam_step_(params, grad, local.own["m"], local.own["v"], b2=self.b2, eps=self.eps, **options)

    # ------------------------------------------------------------------ the interface

    def bind(self, spec: ParamSpec) -> Self:
        """Remember which spans are decayed."""
        bound = super().bind(spec)
        object.__setattr__(bound, "_decayed", _decayed_spans(spec) if self.no_decay_1d else ((0, spec.numel),))
        return bound

    def server_init(self, params: Tensor) -> Tree:
        """Packed moments, ``direction`` (P,) and ``t``, all zero, as far as the method uses them."""
        dtype = moment_dtype(params.dtype)
        state: Tree = {name: params.new_zeros(self.packed_size(), dtype=dtype) for name in self.carried}
        if self.directed:
            state["direction"] = torch.zeros_like(params)
        if self.clocked:
            state["t"] = torch.zeros((), dtype=torch.int64)
        return state

    def broadcast(self, server: Tree, params: Tensor, ctx: Context, client: Client) -> tuple[Tensor, Tree]:
        """Model and all of the server state."""
        return params, dict(server)

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Local]:
        """Keep the message; moments begin with the first step, in the shape of its gradient."""
        shared = dict(message)
        if "t" in shared:
            shared["t"] = shared["t"].cpu()  # read in each step
        return params, Local(shared)

    def local_step(self, params: Tensor, grad_fn: GradFn, batch: Any, local: Local, step: Step) -> tuple[Tensor, Local]:
        """Adam's step, decay and direction."""
        grad, _ = grad_fn(params, batch, rng=step.rng)
        clip_norm(grad, self.clip_grad)
        if step.k == 0:
            self._begin(grad, local)
        spared = _views((params, local.own["m"], local.own["v"]), grad_fn.missing) if grad_fn.missing else []
        before = [view.clone() for view in spared]
        grad = self.adjusted(grad, local, step)
        shrink = self._decay(params, grad, step.lr)
        adam, pull = self.weights
        self.advance(params, grad, local, rate=step.lr * adam, decay=shrink, **self._numbers(step.k + 1, local))
        if pull:
            params.add_(local.shared["direction"], alpha=-step.lr * pull)
        for view, values in zip(spared, before, strict=True):
            view.copy_(values)
        return params, local

    def local_finish(
        self, start: Tensor, params: Tensor, message: Tree, state: Tree, local: Local, ctx: Context
    ) -> tuple[Tree, Tree]:
        """Move and packed moments."""
        return {"delta": params - start} | {name: self.pack(local.own[name]) for name in self.carried}, state

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Average of the models and moments, the new direction, and the largest K on top of ``t``."""
        state: Tree = {name: reduced[name] for name in self.carried}
        if self.directed:
            state["direction"] = reduced["delta"] / -(ctx.steps * ctx.lr)
        if self.clocked:
            state["t"] = server["t"] + ctx.max_steps
        return params + reduced["delta"], state

    # ------------------------------------------------------------------ parts

    def _begin(self, grad: Tensor, local: Local) -> None:
        """Moments before the first step.

        An m that starts from zero is kept divided by ``1 - b1^k``, as a mean with weights that add up to 1, which the
        first step sets to its gradient: so it takes the place of the gradient, and nothing has to be cleared.
        """
        like = grad.to(moment_dtype(grad.dtype))
        for name in ("m", "v"):
            if name in self.carried:
                local.own[name] = self.unpack(local.shared[name], like)
            else:
                local.own[name] = like if name == "m" else torch.zeros_like(like)

    def _numbers(self, k: int, local: Local) -> dict[str, float]:
        """``b1`` and bias corrections of the k-th step, from 1."""
        c1, c2 = self.corrections(k, k + int(local.shared["t"]) if "t" in local.shared else k)
        if "m" in self.carried:
            return {"b1": self.b1, "c1": c1, "c2": c2}
        kept = 1 - self.b1**k
        return {"b1": 1 - (1 - self.b1) / kept, "c1": c1 / kept, "c2": c2}

    def _decay(self, params: Tensor, grad: Tensor, lr: float) -> float:
        """Decay that is not left to Adam's step; returns what is."""
        if not self.coupled and not self.no_decay_1d:
            return lr * self.weight_decay
        for start, stop in self._decayed if self.weight_decay else ():
            if self.coupled:
                grad[..., start:stop].add_(params[..., start:stop], alpha=self.weight_decay)
            else:
                params[..., start:stop].mul_(1.0 - lr * self.weight_decay)
        return 0.0


def _decayed_spans(spec: ParamSpec) -> tuple[tuple[int, int], ...]:
    """Spans of tensors of two or more dimensions, neighbours joined."""
    spans: list[tuple[int, int]] = []
    for item in spec:
        if len(item.shape) < 2:
            continue
        start = spans.pop()[0] if spans and spans[-1][1] == item.start else item.start
        spans.append((start, item.stop))
    return tuple(spans)


def _views(tensors: tuple[Tensor, ...], spans: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Spans of the last dimension of all tensors."""
    return [tensor[..., start:stop] for tensor in tensors for start, stop in spans]
