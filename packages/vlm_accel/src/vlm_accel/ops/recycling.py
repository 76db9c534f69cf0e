"""iLLaVA's second merge rule: a few of the kept tokens take in what resembles them (3.4)."""

from __future__ import annotations

import torch
from polymodal.errors import UserError
from torch import Tensor

from vlm_accel.methods.base import Reduced, Trace
from vlm_accel.ops._select import check, gather_rows, identity, masses, owners, places, ranked, wide

__all__ = ["recycle"]


def recycle(
    x: Tensor,
    scores: Tensor,
    keep: int,
    pc_ratio: float = 0.05,
    neighbours: int = 5,
    sizes: Tensor | None = None,
    trace: Trace = True,
) -> Reduced:
    """Keep the best ``keep`` tokens; the last c of them become half themselves, half a mean of removed tokens.

    c = max(1, round(pc_ratio * keep)), at most keep. In descending score, P_i = the first keep - c stay as they are,
    P_c = the next c, R = the rest. For p in P_c, with J the ``neighbours`` rows of R that have the largest dot product
    with x_p, x_p <- (x_p + sum_J softmax(<x_p, x_j> / sqrt(D))_j x_j) / 2. All from values before the step.

    Args:
        x: (S, N, D); for cells of g patches, D is g times the width.
        scores: (S, N), higher = keep.
        keep: M, within [1, N]; N gives back the same tensor.
        pc_ratio: share of the kept tokens that take in others, in [0, 1].
        neighbours: rows of R that each takes in, at least 1; fewer where R is smaller.
        sizes: (S, N) or None: ones; a removed token's size goes to its owner, that of a token without owner is lost.
        trace: whether ``assign`` and ``weight`` are wanted; ``"assign"``: the former only.

    Returns:
        ``Reduced`` with rows in their old order. The owner of a removed token is the p that gave it the largest weight
        (the lowest p of equals); -1 for one that is in no J.

    Raises:
        UserError: shapes, ``keep``, ``pc_ratio`` or ``neighbours`` that do not fit.

    Source: iLLaVA 3.4, 4.3 (arXiv 2412.06263, ICLR version, mode 3 of the released code). Similarities and sums in
    float32; of equal similarities the lower row comes first.
    """
    check(x, keep, scores)
    if not 0 <= pc_ratio <= 1 or neighbours < 1:
        raise UserError(f"pc_ratio={pc_ratio}, neighbours={neighbours}; expected 0 <= pc_ratio <= 1, neighbours >= 1")
    n, width = x.shape[1:]
    if keep == n:
        return identity(x, sizes)
    takers = min(keep, max(1, round(pc_ratio * keep)))
    order = ranked(scores)
    kept = order[:, :keep].sort(-1).values
    taking = order[:, keep - takers : keep].sort(-1).values
    rest = order[:, keep:].sort(-1).values
    xp, xr = wide(gather_rows(x, taking)), wide(gather_rows(x, rest))
    similar = xp @ xr.transpose(1, 2)
    best, chosen = _largest(similar, min(neighbours, n - keep))
    # -1 marks what is in no J, so that a share that has underflowed to 0 still has an owner.
    share = torch.full_like(similar, -1.0).scatter(2, chosen, torch.softmax(best / width**0.5, dim=-1))
    taken = (xp + share.clamp(min=0) @ xr) / 2
    place = places(kept, taking)
    out = gather_rows(x, kept).scatter_(1, place[..., None].expand(-1, -1, width), taken.to(x.dtype))
    owner = torch.where(share.amax(1) >= 0, place.gather(1, share.argmax(1)), -1)
    mass = masses(x, sizes)
    # Tokens without owner are added to a row behind the last one, which is cut off.
    added = torch.zeros(x.shape[0], keep + 1, dtype=mass.dtype, device=x.device)
    added.scatter_add_(1, torch.where(owner < 0, keep, owner), mass.gather(1, rest))
    new_sizes = mass.gather(1, kept) + added[:, :keep]
    if not trace:
        return Reduced(x=out, kept=kept, sizes=new_sizes)
    assign = owners(kept, n).scatter_(1, rest, owner)
    weight = None if trace == "assign" else _weights(kept, place, rest, share.detach().clamp(min=0), n)
    return Reduced(x=out, kept=kept, sizes=new_sizes, assign=assign, weight=weight)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest along the last axis and their places; of equals the lower place, which topk leaves open."""
    if count > 16:
        best, places = values.sort(dim=-1, descending=True, stable=True)
        return best[..., :count], places[..., :count]
    left = values.detach().clone()
    found = []
    for _ in range(count):
        found.append(left.max(-1, keepdim=True).indices)
        left.scatter_(-1, found[-1], -torch.inf)
    chosen = torch.cat(found, dim=-1)
    return values.gather(-1, chosen), chosen


def _weights(kept: Tensor, place: Tensor, rest: Tensor, share: Tensor, tokens: int) -> Tensor:
    """(S, M, N): one-hot rows, but rows of ``place`` have 1/2 on themselves and ``share`` / 2 on ``rest``."""
    s, m = kept.shape
    weight = torch.zeros(s, m, tokens, dtype=share.dtype, device=kept.device).scatter_(2, kept[..., None], 1.0)
    rows = torch.zeros(s, place.shape[1], tokens, dtype=share.dtype, device=kept.device)
    rows.scatter_(2, rest[:, None].expand(-1, place.shape[1], -1), share / 2)
    rows.scatter_(2, kept.gather(1, place)[..., None], 0.5)
    return weight.scatter_(1, place[..., None].expand(-1, -1, tokens), rows)
