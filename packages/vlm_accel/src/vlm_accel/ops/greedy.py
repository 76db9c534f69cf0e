"""Greedy choice of unlike tokens: max-min diversity (DivPrune), removal of duplicates (VisPruner). iLLaVA 5."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_accel.ops._select import gather_rows, ranked, wide

__all__ = ["distinct", "max_min"]


def max_min(distance: Tensor, keep: int) -> Tensor:
    """The rows that greedy max-min diversity picks (DivPrune).

    The first is the one whose nearest other row is farthest away; then again and again the one farthest from its
    nearest picked row. Ties: the lower index.

    Args:
        distance: (S, N, N), symmetric; its diagonal is not read.
        keep: m within [1, N].

    Returns:
        (S, m) int64, ascending.
    """
    n = distance.shape[1]
    own = torch.eye(n, dtype=torch.bool, device=distance.device)
    nearest = distance.masked_fill(own, torch.inf).amin(-1)
    # a picked row is infinitely near itself, so that it is never picked again
    distance = distance.masked_fill(own, -torch.inf)
    picked = []
    for number in range(keep):
        pick = nearest.argmax(-1, keepdim=True)
        picked.append(pick)
        row = distance.gather(1, pick[..., None].expand(-1, -1, n)).squeeze(1)
        nearest = row if number == 0 else torch.minimum(nearest, row)
    return torch.cat(picked, 1).sort(-1).values


def distinct(x: Tensor, keep: int, step: int = 8) -> Tensor:
    """What is left when tokens much like others are deleted, ``step`` at a time (VisPruner).

    The tokens are split into even and odd places; the even ones with the largest cosine to any odd one go. The new
    order is: the even ones left by that cosine, descending, then the odd ones. Ties: the earlier place.

    Args:
        x: (S, R, D) in order of importance.
        keep: rows left, within [1, R].
        step: rows deleted a round, at most.

    Returns:
        (S, keep) int64 rows of x in the last order.
    """
    x = torch.nn.functional.normalize(wide(x), dim=-1, eps=1e-12)
    # one product for all rounds; each looks up its even rows and odd columns
    cosines = x @ x.transpose(1, 2)
    order = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    while order.shape[1] > keep:
        even, odd = order[:, ::2], order[:, 1::2]
        likeness = gather_rows(cosines, even).gather(2, odd[:, None].expand(-1, even.shape[1], -1)).amax(-1)
        gone = min(step, order.shape[1] - keep, even.shape[1])
        left = ranked(likeness)[:, gone:]
        order = torch.cat([even.gather(1, left), odd], 1)
    return order
