"""What the private methods have in common: one vector a client, a noisy mean back, everything else public."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from fedcore.algorithm import Algorithm, Context, Local, Reduction, Tree
from fedcore.ops.sparse import keep_largest

if TYPE_CHECKING:
    from fedcore.spec import ParamSpec

__all__ = ["PrivateAlgorithm", "SparseUpload", "spans"]


@dataclass(frozen=True, kw_only=True)
class PrivateAlgorithm(Algorithm):
    """Base of the methods with client-level differential privacy.

    A method makes one upload a client and works on with what the mechanism (``fedcore.privacy``) makes of them: clipped
    as a whole, summed, noise added once, divided by the expected cohort m = q N. No method sees a single upload, clips
    for privacy or draws noise. In ``server_step``, ``ctx.cohort`` is m, never the clients that came. K is
    ``ctx.max_steps``, a public number that is the same for all clients: were it the client's own, its size would leak.
    """

    private: ClassVar[bool] = True
    reduction: ClassVar[Reduction] = "sum"

    def with_clip(self, clip: float) -> Self:
        """The method where uploads are clipped to the norm ``clip``; itself, where that makes no difference."""
        return self

    def clip_warning(self, clip: float, steps: int, lr: float) -> str:
        """Why ``clip`` is a doubtful bound for this method, with the remedy; empty where nothing is known against it.

        Args:
            clip: C.
            steps: K, public.
            lr: eta of the first round.
        """
        return ""

    def empty_upload(self, params: Tensor, ctx: Context) -> Tree:
        """Names and shapes of an upload, all zero: what a round without clients sums up.

        Args:
            params: (P,) global parameters.
            ctx: the round.
        """
        return {"delta": torch.zeros_like(params)}


@dataclass(frozen=True, kw_only=True)
class SparseUpload(PrivateAlgorithm):
    """Uploads keep the largest entries of each tensor (``topk``), before they are clipped.

    Which entries stay depends on the client's data. That is safe only because the mask is part of the vector that is
    clipped, and noise is added to all P coordinates.

    Args:
        topk: share of each tensor's entries that is kept, 0 < topk <= 1 (1: all).
    """

    topk: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("topk", 0 < self.topk <= 1, "0 < topk <= 1, 1 keeps all")

    def local_finish(
        self, start: Tensor, params: Tensor, message: Tree, state: Tree, local: Local, ctx: Context
    ) -> tuple[Tree, Tree]:
        """The move, with its small entries set to zero."""
        return {"delta": keep_largest(params - start, spans(self.spec), self.topk)}, state


def spans(spec: ParamSpec) -> list[tuple[int, int]]:
    """Where each tensor lies in the flat vector."""
    return [(item.start, item.stop) for item in spec]
