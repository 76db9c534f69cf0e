"""Rules that fold the unimportant tokens into one, and the rules without any merging (iLLaVA 3.3, 3.4, 5)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from polymodal.errors import UserError
from torch import Tensor

from vlm_accel.methods.base import Reduced, Trace
from vlm_accel.ops._select import (
    check,
    exact_dtype,
    gather_rows,
    identity,
    masses,
    mean_weight,
    owners,
    places,
    ranked,
    top,
    wide,
)

__all__ = ["FoldWeights", "drop", "fuse", "rank1", "select", "shift", "stride"]

FoldWeights = Literal["rank_desc", "rank_asc", "uniform", "score"]


def rank1(
    x: Tensor,
    scores: Tensor,
    keep: int,
    weights: FoldWeights = "rank_desc",
    sizes: Tensor | None = None,
    trace: Trace = True,
) -> Reduced:
    """Fold the r + 1 lowest tokens into one, which stands where the best of them stood.

    With g_0..g_r the r + 1 = N - keep + 1 lowest in ascending score, x[g_r] becomes sum_t w_t x[g_t] / sum_t w_t, and
    g_0..g_{r-1} are deleted. Of equal scores the lower row counts as higher.

    Args:
        x: (S, N, D).
        scores: (S, N), higher = keep.
        keep: M, within [1, N]; N gives back the same tensor.
        weights: of g_0..g_r: ``rank_desc`` r + 1, r, ..., 1 (the released code: most weight on the least attended),
            ``rank_asc`` 1, ..., r + 1, ``uniform``, ``score`` the scores themselves (not negative).
        sizes: (S, N) source tokens of each row, or None: ones; the folded row gets their sum.
        trace: whether ``assign`` and ``weight`` are wanted; ``"assign"``: the former only.

    Returns:
        ``Reduced`` with rows in their old order.

    Raises:
        UserError: shapes or ``keep`` that do not fit, unknown weights.

    Source: iLLaVA 3.3 (arXiv 2412.06263, first version, released code). Summed in float32, cast once at the end; the
    code goes through float16, where bfloat16 activations may overflow.
    """
    check(x, keep, scores)
    if weights not in get_args(FoldWeights):
        raise UserError(f"weights={weights!r}; use one of {', '.join(get_args(FoldWeights))}")
    if keep == x.shape[1]:
        return identity(x, sizes)
    order = ranked(scores)
    low = order[:, keep - 1 :]
    count = low.shape[1]
    exact = exact_dtype(x)
    if weights == "score":
        share = scores.gather(1, low).to(exact)
        total = share.sum(-1, keepdim=True)
        share = torch.where(total > 0, share, 1.0)  # all zero: no score says more than another
    elif weights == "uniform":
        share = torch.ones(low.shape, dtype=exact, device=x.device)
    else:
        ranks = torch.arange(1, count + 1, dtype=exact, device=x.device)  # low[0] is g_r, the best of them
        share = (ranks if weights == "rank_desc" else ranks.flip(0)).expand(low.shape)
    return _fold(x, order, keep, share / share.sum(-1, keepdim=True), sizes, trace)


def fuse(x: Tensor, scores: Tensor, keep: int, sizes: Tensor | None = None, trace: Trace = True) -> Reduced:
    """Keep the ``keep - 1`` best and one token that is the sum of all others, each times its score.

    The scores are attention, taken as it is: the weights do not add up to 1 (EViT).

    Args:
        x: (S, N, D).
        scores: (S, N), higher = keep.
        keep: M, within [1, N], the fused token counted; N gives back the same tensor.
        sizes: (S, N) or None: ones; the fused row gets the sum.
        trace: whether ``assign`` and ``weight`` are wanted; ``"assign"``: the former only.

    Returns:
        ``Reduced``; the fused row stands where the best of its sources stood (EViT appends it at the end; in an encoder
        with absolute positions that order has no effect, and ``kept`` stays ascending).

    Source: EViT (arXiv 2202.07800), as in iLLaVA 5.
    """
    check(x, keep, scores)
    if keep == x.shape[1]:
        return identity(x, sizes)
    order = ranked(scores)
    share = scores.to(exact_dtype(x)).gather(1, order[:, keep - 1 :])
    return _fold(x, order, keep, share, sizes, trace)


def _fold(x: Tensor, order: Tensor, keep: int, share: Tensor, sizes: Tensor | None, trace: Trace) -> Reduced:
    """Rows ``order[:, keep - 1:]`` become one, the sum by ``share`` (S, r + 1), at the place of the first of them."""
    low, best = order[:, keep - 1 :], order[:, keep - 1 : keep]
    kept = order[:, :keep].sort(-1).values
    place = places(kept, best)
    folded = share.unsqueeze(1) @ wide(gather_rows(x, low))
    out = gather_rows(x, kept)
    out = out.scatter_(1, place[..., None].expand(-1, -1, x.shape[-1]), folded.to(x.dtype))
    mass = masses(x, sizes)
    new_sizes = mass.gather(1, kept).scatter_(1, place, mass.gather(1, low).sum(-1, keepdim=True))
    if not trace:
        return Reduced(x=out, kept=kept, sizes=new_sizes)
    assign = owners(kept, x.shape[1])
    assign.scatter_(1, low, place.expand(low.shape))
    if trace == "assign":
        return Reduced(x=out, kept=kept, sizes=new_sizes, assign=assign)
    weight = torch.zeros(*kept.shape, x.shape[1], dtype=share.dtype, device=x.device)
    weight.scatter_(2, kept[..., None], 1.0)
    row = torch.zeros(x.shape[:2], dtype=share.dtype, device=x.device).scatter_(1, low, share)
    weight.scatter_(1, place[..., None].expand(-1, -1, x.shape[1]), row[:, None])
    return Reduced(x=out, kept=kept, sizes=new_sizes, assign=assign, weight=weight)


def select(x: Tensor, kept: Tensor, sizes: Tensor | None = None, trace: Trace = True) -> Reduced:
    """Keep the rows ``kept`` (S, M), ascending, and delete the others.

    ``weight`` stays None: every row is the input row in ``kept``.
    """
    return Reduced(
        x=gather_rows(x, kept),
        kept=kept,
        sizes=None if sizes is None else sizes.gather(1, kept),
        assign=owners(kept, x.shape[1]) if trace else None,
    )


def drop(x: Tensor, scores: Tensor, keep: int, sizes: Tensor | None = None, trace: Trace = True) -> Reduced:
    """Keep the ``keep`` tokens of highest score in their old order, delete the others.

    Args:
        x: (S, N, D).
        scores: (S, N), higher = keep; of equal scores the lower row is kept.
        keep: M, within [1, N]; N gives back the same tensor.
        sizes: (S, N) or None; gathered.
        trace: whether ``assign`` is wanted (-1 for what was deleted).

    Source: iLLaVA 3.4, mode 1; FastV (arXiv 2403.06764) in a decoder.
    """
    check(x, keep, scores)
    if keep == x.shape[1]:
        return identity(x, sizes)
    return select(x, top(scores, keep)[0], sizes, trace)


def stride(x: Tensor, keep: int, sizes: Tensor | None = None, trace: Trace = True) -> Reduced:
    """Keep rows ``i * N // keep`` for i = 0..keep - 1, delete the others: a control that looks at nothing."""
    check(x, keep)
    if keep == x.shape[1]:
        return identity(x, sizes)
    rows = torch.arange(keep, device=x.device) * x.shape[1] // keep
    return select(x, rows.expand(x.shape[0], keep), sizes, trace)


def shift(x: Tensor, keep: int, sizes: Tensor | None = None, trace: Trace = True) -> Reduced:
    """The last token is averaged into the one before it and deleted, N - keep times; scores play no part.

    In one go: row keep - 1 becomes the sum of the rows behind it with weights 1/2, 1/4, ..., 2^-r, 2^-r.

    Args:
        x: (S, N, D).
        keep: M, within [1, N]; N gives back the same tensor.
        sizes: (S, N) or None: ones; the last row gets the sum.
        trace: whether ``assign`` and ``weight`` are wanted; ``"assign"``: the former only.

    Source: iLLaVA 3.4, mode 2 of the released code: a baseline.
    """
    check(x, keep)
    s, n = x.shape[:2]
    if keep == n:
        return identity(x, sizes)
    removed = n - keep
    exact = exact_dtype(x)
    halvings = torch.arange(1, removed + 2, dtype=exact, device=x.device).clamp(max=removed)
    share = torch.exp2(-halvings)
    folded = share @ wide(x[:, keep - 1 :])
    out = torch.cat([x[:, : keep - 1], folded[:, None].to(x.dtype)], dim=1)
    kept = torch.arange(keep, device=x.device).expand(s, keep)
    mass = masses(x, sizes)
    new_sizes = torch.cat([mass[:, : keep - 1], mass[:, keep - 1 :].sum(-1, keepdim=True)], dim=1)
    if not trace:
        return Reduced(x=out, kept=kept, sizes=new_sizes)
    assign = torch.arange(n, device=x.device).clamp(max=keep - 1).expand(s, n)
    mass = torch.cat([torch.ones(keep - 1, dtype=exact, device=x.device), share]).expand(s, n)
    weight = None if trace == "assign" else mean_weight(assign, mass, keep)
    return Reduced(x=out, kept=kept, sizes=new_sizes, assign=assign, weight=weight)
