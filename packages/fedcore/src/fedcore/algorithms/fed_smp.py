"""Fed-SMP: uploads live on random coordinates that everybody knows, and so does the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcore.algorithm import Context, Local, Tree
from fedcore.algorithms._private import PrivateAlgorithm
from fedcore.ops.sparse import random_coordinates

__all__ = ["FedSMP"]


@dataclass(frozen=True, kw_only=True)
class FedSMP(PrivateAlgorithm):
    """DP-FedAvg on a random share of the coordinates, new in each round and the same for all clients.

    The coordinates depend on the round alone, so they tell nothing: clip and noise are needed on ``p P`` numbers only,
    of which the norm of the noise is ``sqrt(p)`` of DP-FedAvg's, while the others rest in that round. ``p P`` floats
    up. ``scale`` multiplies uploads by 1/p before the clip, which makes them unbiased where nothing is clipped. ``p=1``
    is DP-FedAvg. How the share is chosen (0.4) is our reading; what the script of DP-FedPGN calls by this name keeps
    the largest entries after the noise instead.

    Source: Hu et al. 2022, arXiv 2202.07178, the rand_k variant.

    Args:
        p: share of the coordinates, 0 < p <= 1; their number is rounded up.
        scale: whether uploads are multiplied by 1/p.
        mask_seed: of the coordinates; public.
    """

    p: float = 0.4
    scale: bool = False
    mask_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("p", 0 < self.p <= 1, "0 < p <= 1, 1 is DP-FedAvg")

    def coordinates(self, round: int, size: int, device: torch.device) -> Tensor:
        """The coordinates of a round, rising int64."""
        return random_coordinates(size, math.ceil(self.p * size), self.mask_seed, round).to(device)

    def empty_upload(self, params: Tensor, ctx: Context) -> Tree:
        """``delta``, on the coordinates of the round."""
        return {"delta": params.new_zeros(math.ceil(self.p * params.shape[-1]))}

    def local_finish(
        self, start: Tensor, params: Tensor, message: Tree, state: Tree, local: Local, ctx: Context
    ) -> tuple[Tree, Tree]:
        """The move on the coordinates of the round."""
        delta = (params - start).index_select(-1, self.coordinates(ctx.round, params.shape[-1], params.device))
        return {"delta": delta.div_(self.p) if self.scale else delta}, state

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Move on these coordinates."""
        places = self.coordinates(ctx.round, params.shape[-1], params.device)
        return params.index_add(-1, places, reduced["delta"]), server
