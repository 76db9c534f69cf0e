"""LightVLM's merge rule: every removed token joins the kept token that it resembles most (3.4)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from polymodal.errors import UserError
from torch import Tensor

from vlm_accel.methods.base import Reduced, Trace
from vlm_accel.ops._select import (
    add_rows,
    check,
    gather_rows,
    identity,
    join,
    masses,
    mean_weight,
    owners,
    top,
    wide,
)

__all__ = ["AssignWeights", "assign", "nearest"]

AssignWeights = Literal["size", "score"]
#: entries of the similarity matrix that are held at a time
_CHUNK = 1 << 24


def assign(
    x: Tensor,
    scores: Tensor,
    keep: int,
    sizes: Tensor | None = None,
    weights: AssignWeights = "size",
    trace: Trace = True,
) -> Reduced:
    """Keep the best ``keep`` tokens; each becomes the mean of itself and the removed tokens nearest to it.

    t(j) = argmax over kept p of cos(x_j, x_p) (the lowest p of equals); with sizes c, x_p becomes
    (c_p x_p + sum_{t(j) = p} c_j x_j) / (c_p + sum c_j) and c_p the sum of sizes. Conserved: sum c x and sum c.

    Args:
        x: (S, N, D).
        scores: (S, N), higher = keep.
        keep: M, within [1, N]; N gives back the same tensor.
        sizes: (S, N) source tokens of each row, positive; None: ones.
        weights: ``score``: c_j s_j in place of c_j in the mean (sizes still add; scores not negative).
        trace: whether ``assign`` and ``weight`` are wanted; ``"assign"``: the former only.

    Returns:
        ``Reduced`` with rows in their old order. A row that nothing joins stays bit for bit.

    Raises:
        UserError: shapes or ``keep`` that do not fit, unknown weights.

    Source: LightVLM 3.4 (arXiv 2509.00419), our reading: the paper's rule could not be read. Sums and similarities in
    float32, one cast at the end.
    """
    check(x, keep, scores)
    if weights not in get_args(AssignWeights):
        raise UserError(f"weights={weights!r}; use one of {', '.join(get_args(AssignWeights))}")
    if keep == x.shape[1]:
        return identity(x, sizes)
    kept, rest = top(scores, keep)
    chosen, removed = gather_rows(x, kept), gather_rows(x, rest)
    target = nearest(removed, chosen)
    size = masses(x, sizes)
    mass = size * scores.to(size.dtype) if weights == "score" else size
    own = mass.gather(1, kept)
    mean = wide(chosen)
    total = join(mean, target, wide(removed), own, mass.gather(1, rest))
    new_sizes = total if mass is size else add_rows(size.gather(1, kept), target, size.gather(1, rest))
    reduced = Reduced(x=mean.to(x.dtype), kept=kept, sizes=new_sizes)
    if trace:
        reduced.assign = owners(kept, x.shape[1]).scatter_(1, rest, target)
    if trace is True:
        assert reduced.assign is not None
        weight = mean_weight(reduced.assign, mass, keep)
        one_hot = torch.zeros_like(weight).scatter_(2, kept[..., None], 1.0)
        reduced.weight = torch.where((total != own)[..., None], weight, one_hot)
    return reduced


def nearest(removed: Tensor, kept: Tensor) -> Tensor:
    """The kept row of largest cosine for each removed row, the lowest of equals.

    Args:
        removed: (S, R, D).
        kept: (S, M, D).

    Returns:
        (S, R) int64 in [0, M). A removed row's own norm does not change its order, so only kept rows are normalised.
        Similarities are made in pieces of at most about 16 million entries.
    """
    directions = wide(kept.detach()).transpose(1, 2)
    scale = 1 / directions.norm(dim=1, keepdim=True).clamp(min=1e-12)
    rows = max(1, _CHUNK // max(1, removed.shape[0] * kept.shape[1]))
    parts = [
        (wide(part) @ directions).mul_(scale).max(-1).indices for part in torch.split(removed.detach(), rows, dim=1)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
