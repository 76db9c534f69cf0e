"""DP-SCAFFOLD: control variates whose differences are released together with the moves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedcore.algorithm import Context, Local, Tree
from fedcore.algorithms._private import PrivateAlgorithm
from fedcore.algorithms.scaffold import Scaffold

__all__ = ["DPScaffold"]


@dataclass(frozen=True, kw_only=True)
class DPScaffold(Scaffold, PrivateAlgorithm):
    """SCAFFOLD with client-level privacy: move and change of variate are clipped as one vector.

    The upload is ``(delta_i, k K eta (c_i^+ - c_i))``; one clip to C over both and one noise make it one event to
    account. The factor ``K eta`` brings a variate, a mean gradient, to the size of a move; ``k`` is the public choice
    of how much of the clip and the noise goes to which: c receives noise of ``sigma C / (k K eta)``. The server takes
    the factor back and adds ``q mean_i (c_i^+ - c_i)`` to c. A client keeps its own variate as it is: what it holds for
    itself is not released. c is then no longer exactly the mean of the variates. Without noise and clipping it is
    SCAFFOLD.

    The paper is about single samples' privacy, made by noise in local steps; the client-level form is our reading.

    Source: Noble et al. 2022, arXiv 2111.09278; Karimireddy et al. 2020, arXiv 1910.06378, option II.

    Args:
        k: weight of the variates in the upload, more than 0.
    """

    k: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("k", 0 < self.k < math.inf, "more than 0")

    def empty_upload(self, params: Tensor, ctx: Context) -> Tree:
        """``delta`` and ``variate`` (P,)."""
        return {"delta": torch.zeros_like(params), "variate": torch.zeros_like(params)}

    def local_finish(
        self, start: Tensor, params: Tensor, message: Tree, state: Tree, local: Local, ctx: Context
    ) -> tuple[Tree, Tree]:
        """As SCAFFOLD with the public K, the change of variate in the units of a move."""
        public = replace(ctx, steps=ctx.max_steps)
        upload, kept = super().local_finish(start, params, message, state, local, public)
        return {"delta": upload["delta"], "variate": upload["variate"].mul_(self._factor(ctx))}, kept

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Average; the expected share of the clients moves ``c``."""
        share = ctx.cohort / (ctx.num_clients * self._factor(ctx))
        return params + reduced["delta"], {"c": torch.add(server["c"], reduced["variate"], alpha=share)}

    def _factor(self, ctx: Context) -> float:
        return self.k * ctx.max_steps * ctx.lr
