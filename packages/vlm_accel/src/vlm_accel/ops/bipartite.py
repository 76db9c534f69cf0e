"""ToMe's bipartite matching: the most similar pairs merge."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_accel.methods.base import Reduced, Trace
from vlm_accel.ops._select import check, gather_rows, identity, join, masses, mean_weight, ranked, wide

__all__ = ["tome"]


def tome(
    x: Tensor, keys: Tensor, keep: int, sizes: Tensor | None = None, prefix: int = 0, trace: Trace = True
) -> Reduced:
    """Merge the N - keep most similar pairs of an even and an odd token.

    The metric is the head mean of the keys, normalised. A = rows at even positions, B = at odd ones, positions counted
    with the ``prefix`` rows in front. Each a points to the b of largest cosine (the lowest of equals); the best edges
    (the lower a of equals) merge a into b: mean weighted by sizes, sizes add.

    Args:
        x: (S, N, D).
        keys: (S, N, H, d).
        keep: M, within [1, N]; N gives back the same tensor.
        sizes: (S, N) source tokens of each row; None: ones.
        prefix: rows in front of these (a CLS row makes the first patch odd).
        trace: whether ``assign`` and ``weight`` are wanted; ``"assign"``: the former only.

    Returns:
        ``Reduced`` with ``key_bias`` = log sizes, for later attention. Rows are in ascending position, b where it
        stood: the original gives [unmerged A, B], but our encoders want ``kept`` ascending, and without relative
        positions the order has no effect.

    One matching merges at most half of the rows (the original cuts the wish down silently). Where more shall go, the
    matching is repeated on its result, with metrics averaged as the tokens are: the promised count is always met.

    Source: ToMe (arXiv 2210.09461) as in iLLaVA 5; written from the specification, not from the official code.
    """
    check(x, keep)
    n = x.shape[1]
    mass = masses(x, sizes)
    if keep == n:
        reduced = identity(x, mass)
        reduced.key_bias = mass.log()
        return reduced
    tokens, metric, sums = wide(x), wide(keys).mean(2), mass
    kept = torch.arange(n, device=x.device).expand(x.shape[:2])
    owner = kept
    while (rows := tokens.shape[1]) > keep:
        merged, target, left = _match(metric, min(rows - keep, rows // 2), prefix)
        # Where each row goes: rows that stay by their rank, merged ones to the rank of their b.
        rank = torch.zeros(left.shape[0], rows, dtype=torch.int64, device=x.device)
        rank.scatter_(1, left, torch.arange(left.shape[1], device=x.device).expand_as(left))
        rank.scatter_(1, merged, rank.gather(1, target))
        target, own, mass_of_merged = rank.gather(1, merged), sums.gather(1, left), sums.gather(1, merged)
        if left.shape[1] > keep:
            metric = _merge(metric, left, merged, target, own, mass_of_merged)[0]
        tokens, sums = _merge(tokens, left, merged, target, own, mass_of_merged)
        kept, owner = kept.gather(1, left), rank.gather(1, owner)
    reduced = Reduced(x=tokens.to(x.dtype), kept=kept, sizes=sums, key_bias=sums.float().log())
    if trace:
        reduced.assign = owner
    if trace is True:
        reduced.weight = mean_weight(owner, mass, keep)
    return reduced


def _match(metric: Tensor, merges: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of A that merge (S, r), the row of B each goes to (S, r), and all rows that stay (S, n - r), ascending."""
    s, n = metric.shape[:2]
    even = torch.arange(prefix % 2, n, 2, device=metric.device)
    odd = torch.arange(1 - prefix % 2, n, 2, device=metric.device)
    unit = torch.nn.functional.normalize(metric.detach(), dim=-1, eps=1e-12)
    best, target = (unit[:, even] @ unit[:, odd].transpose(1, 2)).max(-1)  # the first of equals
    edges = ranked(best)
    gone = edges[:, :merges]
    stay = torch.cat([even[edges[:, merges:]], odd.expand(s, -1)], dim=1).sort(-1).values
    return even[gone], odd[target.gather(1, gone)], stay


def _merge(x: Tensor, left: Tensor, merged: Tensor, target: Tensor, own: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``left`` of x (S, n, D) with rows ``merged`` averaged into their ``target``, and the mass of each."""
    staying = gather_rows(x, left)
    total = join(staying, target, gather_rows(x, merged), own, mass)
    return staying, total
