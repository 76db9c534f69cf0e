"""DP-FedAvg with BLUR and LUS: clients are held within the clip's reach, and drop small entries."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from polymodal.errors import UserError
from torch import Tensor

from fedcore.algorithm import Context, GradFn, Local, Step, Tree
from fedcore.algorithms._private import SparseUpload
from fedcore.ops.schedule import descend
from fedcore.spec import ParamSpec

__all__ = ["DPBlur"]


@dataclass(frozen=True, kw_only=True)
class DPBlur(SparseUpload):
    """DP-FedAvg whose local loss pulls a client back where its move gets longer than the clip.

    Bounded local update regularisation (BLUR) adds ``(a/2) max(0, ||theta_k - theta||^2 - C^2)`` to the loss, whose
    gradient is ``a (theta_k - theta)`` outside the ball and zero inside; it is added after the gradient is clipped.
    Local update sparsification (LUS) is ``topk``: entries below the largest share are set to zero before the clip.
    ``a=0, topk=1`` is DP-FedAvg. (The script of DP-FedPGN adds the penalty as a number without gradient, so that its
    BLUR is DP-FedAvg.) That C is also the radius is our reading.

    Source: Cheng et al. 2022, arXiv 2203.03106, equations of BLUR and LUS.

    Args:
        a: strength of the pull, 0 or more.
        radius: C of the penalty (default: privacy.clip).
        topk: share of each tensor's entries that is kept, 0 < topk <= 1 (1: no LUS).
    """

    a: float = 0.4
    radius: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("a", 0 <= self.a < math.inf, "0 (no pull) or more")
        self.check("radius", self.radius is None or self.radius > 0, "more than 0")

    def with_clip(self, clip: float) -> Self:
        """The radius is the clip, unless it was given."""
        return dataclasses.replace(self, radius=clip) if self.radius is None else self

    def bind(self, spec: ParamSpec) -> Self:
        """As for all; UserError where nothing says how far clients may go."""
        if self.radius is None and self.a:
            raise UserError("radius of dp_blur is not known here; give privacy.clip or the option radius")
        return super().bind(spec)

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Local]:
        """Keep the model received."""
        return params, Local(shared={"anchor": params})

    def local_step(self, params: Tensor, grad_fn: GradFn, batch: Any, local: Local, step: Step) -> tuple[Tensor, Local]:
        """SGD with the pull where it acts."""
        grad = self.gradient(params, grad_fn, batch, step)
        if self.a and self.radius is not None:
            move = params - local.shared["anchor"]
            outside = move.norm(dim=-1, keepdim=True) > self.radius
            grad.add_(move.mul_(outside), alpha=self.a)
        return descend(params, grad, step.lr), local
