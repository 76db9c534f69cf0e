"""The interface of a federated method: pure functions over flat parameter vectors, with no engine and no trainer.

One implementation runs one client after the other, in worker processes, or for many clients in one computation. All
vectors are flat views ``(..., P)`` of the trainable parameters in the order of ``ParamSpec``; where many clients are
computed together, they have a leading client dimension ``(clients, P)``. Elementwise formulas need no care for that;
norms and sums go over the last dimension with ``keepdim=True``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from polymodal.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fedcore.spec import ParamSpec

__all__ = ["Algorithm", "Client", "Context", "GradFn", "Local", "RoundLr", "Step", "Tree", "clip_norm"]

Tree = dict[str, "Tensor"]
"""Server state, client state, message or upload: named tensors, flat vectors or scalars."""
RoundLr = Literal["constant", "exp", "cosine"]
Reduction = Literal["mean", "sum", "list"]


@dataclass(frozen=True)
class Client:
    """One client, or the clients that are computed together.

    Args:
        id: number of the client; a tuple of numbers in the batched engine.
        samples: training samples; (clients, 1) in the batched engine where they differ.
        steps: K, local steps of a round; (clients, 1) in the batched engine where they differ.
        rank: rank of the client's adapters (0: the model has none).
    """

    id: Any
    samples: Any
    steps: Any
    rank: int = 0


@dataclass(frozen=True)
class Context:
    """Public numbers of a round.

    Args:
        round: index of the round, from 0.
        rounds: rounds of the whole run (T).
        num_clients: clients of the federation (N).
        cohort: clients sampled in this round (s); in ``server_step`` those of them that reported.
        lr: local learning rate of this round.
        last_lr: of the round before; ``lr`` in round 0.
        steps: K: of the client at hand in client functions, the mean over reporting clients in ``server_step``.
        max_steps: the largest K of the cohort.
    """

    round: int
    rounds: int
    num_clients: int
    cohort: int
    lr: float
    last_lr: float
    steps: Any
    max_steps: int


@dataclass(frozen=True)
class Step:
    """One local step.

    Args:
        k: index, from 0.
        K: steps that this client will run; (clients, 1) in the batched engine where they differ.
        round: index of the round.
        lr: rate of the round; schedules within the round are the algorithm's.
        last_lr: rate of the round before.
        rng: seed of the step's dropout draws; pass it to ``grad_fn``.
    """

    k: int
    K: Any
    round: int
    lr: float
    last_lr: float
    rng: Any


@dataclass
class Local:
    """What a client carries through its local steps.

    Args:
        shared: the same for every client of the round; read only.
        own: this client's; has the client dimension in the batched engine. May be changed in place.
    """

    shared: Tree = field(default_factory=dict)
    own: Tree = field(default_factory=dict)


class GradFn(Protocol):
    """Mean loss and its gradient on a batch.

    May be called twice in a step (sharpness-aware methods): the second call passes ``update_buffers=False`` and the
    same ``rng``, so that running statistics move once and dropout masks repeat.
    """

    missing: tuple[tuple[int, int], ...]
    """Spans of the vector that received no gradient in the last call (their gradient reads zero)."""

    def __call__(self, params: Tensor, batch: Any, *, rng: Any, update_buffers: bool = True) -> tuple[Tensor, Tensor]:
        """Return the gradient (..., P), owned by the caller, and the mean loss, one for each client."""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Base of all methods: hyper-parameters in the fields, the maths in the eight functions.

    The defaults of the functions are FedAvg's: plain averaging of local moves, no state, no message. Functions do not
    change their arguments, except that ``local_step`` owns ``params`` and ``local.own``. Names of options are those of
    the papers.

    Args:
        lr: base local learning rate eta_0.
        round_lr: decay over rounds: ``exp`` (eta_0 * lr_decay^(t+1), also before round 0, as in the authors' scripts),
            ``cosine`` (eta_0 * (1 + cos(pi t / T)) / 2) or ``constant``.
        lr_decay: factor a round of ``exp``.
        weight_decay: lambda, on all trainable parameters; how it enters is the method's.
        clip_grad: largest norm of the loss gradient, over all parameters, before decay and corrections (0: off).

    Raises:
        UserError: a value out of its range.
    """

    reduction: ClassVar[Reduction] = "mean"
    """How the engine reduces uploads: streamed ``mean`` or ``sum`` in client-id order, or a ``list`` of them all."""
    keeps_state: ClassVar[bool] = False
    """Whether clients keep something between rounds."""
    shifts_base: ClassVar[bool] = False
    """Whether frozen weights change between rounds, see ``base_shift``; such clients run one after the other."""
    adapters: ClassVar[bool] = False
    """Whether it trains low-rank adapters (``spec.adapters``), perhaps of unequal ranks."""
    private: ClassVar[bool] = False
    """Whether uploads go through a privacy mechanism; ``reduced`` is then noisy, see ``fedcore.privacy``."""

    lr: float = 0.1
    round_lr: RoundLr = "exp"
    lr_decay: float = 0.998
    weight_decay: float = 1e-3
    clip_grad: float = 10.0

    def __post_init__(self) -> None:
        self.check("lr", self.lr > 0, "more than 0")
        self.check("lr_decay", 0 < self.lr_decay <= 1, "0 < lr_decay <= 1, 1 keeps the rate")
        self.check("weight_decay", self.weight_decay >= 0, "0 or more")
        self.check("clip_grad", self.clip_grad >= 0, "0 (off) or more")
        if self.round_lr not in ("constant", "exp", "cosine"):
            raise UserError(f"round_lr={self.round_lr!r}; expected constant, exp or cosine")

    def check(self, name: str, good: bool, expected: str) -> None:
        """Raise UserError about the option ``name`` unless it is ``good`` (NaN never is)."""
        if not good:
            raise UserError(f"{name}={getattr(self, name)}; expected {expected}")

    def rate(self, round: int, rounds: int) -> float:
        """Local learning rate of a round (from 0); UserError where it is zero, which would leave nothing to divide by.

        Cosine over T rounds reaches zero only at t = T, which is never used.
        """
        if self.round_lr == "exp":
            rate = self.lr * self.lr_decay ** (round + 1)
        elif self.round_lr == "cosine":
            rate = self.lr * (1 + math.cos(math.pi * round / rounds)) / 2
        else:
            rate = self.lr
        if not rate > 0:
            raise UserError(f"learning rate of round {round} is {rate}; run fewer than {rounds} rounds or raise lr")
        return rate

    # ------------------------------------------------------------------ once

    def bind(self, spec: ParamSpec) -> Self:
        """A copy that knows the model's parameters, as ``self.spec``; subclasses derive their tables here."""
        bound = copy.copy(self)
        object.__setattr__(bound, "spec", spec)
        return bound

    spec: ClassVar[Any] = None
    """``ParamSpec`` of the model, after ``bind``."""

    def server_init(self, params: Tensor) -> Tree:
        """Server state before round 0.

        Args:
            params: (P,) initial global parameters.
        """
        return {}

    def client_init(self, ctx: Context, client: Client) -> Tree:
        """State of a client that is sampled for the first time; ``{}`` where nothing is kept between rounds."""
        return {}

    # ------------------------------------------------------------------ a round

    def broadcast(self, server: Tree, params: Tensor, ctx: Context, client: Client) -> tuple[Tensor, Tree]:
        """What a client is sent: parameters (P_k,) of its model and a message. Both are counted as bytes down."""
        return params, {}

    def base_shift(self, server: Tree, params: Tensor, ctx: Context, client: Client) -> Tree:
        """What a client adds to frozen weights of its model in this round, by parameter name ({}: they stay).

        Added to what the model came with. Not counted as bytes: what travels is the message.
        """
        return {}

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Local]:
        """Start of local training.

        Args:
            params: (P,) parameters received (the same for all clients of a batch).
            message: message received.
            state: the client's state; in the batched engine its tensors are (clients, ...).
            ctx: the round, with this client's steps.
            full_grad: ``full_grad(params)`` is the mean gradient (..., P) over the client's data, in eval mode, of the
                loss without decay; ``full_grad(params, batches=m)`` over the first m batches of the round.

        Returns:
            Where to start, (P,) or (clients, P), and what is carried through the steps.
        """
        return params, Local()

    def local_step(self, params: Tensor, grad_fn: GradFn, batch: Any, local: Local, step: Step) -> tuple[Tensor, Local]:
        """One local step; ``params`` (..., P) may be changed in place and returned."""
        grad = self.gradient(params, grad_fn, batch, step)
        return params.sub_(grad, alpha=step.lr), local

    def local_finish(
        self, start: Tensor, params: Tensor, message: Tree, state: Tree, local: Local, ctx: Context
    ) -> tuple[Tree, Tree]:
        """Upload and the new state of the client; ``start`` is what ``local_init`` returned."""
        return {"delta": params - start}, state

    def decode(self, upload: Tree) -> Tree:
        """What the server reduces from an upload that travels compressed (its bytes are counted before)."""
        return upload

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """New global parameters (P,) and server state; neither argument is changed.

        Args:
            server: server state.
            params: (P,) global parameters of this round.
            reduced: mean or sum of the uploads by name, or the list of ``(client id, weight, upload)``.
            ctx: the round; ``steps`` is the mean K of the clients that reported.
        """
        return params + reduced["delta"], server

    def evaluation_params(self, server: Tree, params: Tensor) -> Tensor:
        """What is evaluated and handed out after a round, (P,); the next round starts from ``params`` all the same."""
        return params

    def evaluation_shift(self, server: Tree, params: Tensor) -> Tree:
        """What is added to frozen weights of the largest model where ``evaluation_params`` is evaluated, by name."""
        return {}

    # ------------------------------------------------------------------ for subclasses

    def gradient(self, params: Tensor, grad_fn: GradFn, batch: Any, step: Step) -> Tensor:
        """Loss gradient (..., P), clipped, plus ``weight_decay * params``."""
        grad, _ = grad_fn(params, batch, rng=step.rng)
        grad = clip_norm(grad, self.clip_grad)
        return grad.add_(params, alpha=self.weight_decay) if self.weight_decay else grad


def clip_norm(grad: Tensor, bound: float) -> Tensor:
    """Scale ``grad`` (..., P) in place so that its norm over the last dimension is at most ``bound`` (0: as it is)."""
    if not bound:
        return grad
    norm = grad.norm(dim=-1, keepdim=True)
    return grad.mul_((bound / norm).clamp_(max=1.0))
