"""What the merge rules share: ranking, gathering, and sums of rows, batched and without a look at values."""

from __future__ import annotations

import torch
from polymodal.errors import UserError
from torch import Tensor

from vlm_accel.methods.base import Reduced

__all__ = [
    "add_rows",
    "check",
    "exact_dtype",
    "gather_rows",
    "identity",
    "join",
    "masses",
    "mean_weight",
    "owners",
    "places",
    "ranked",
    "top",
    "wide",
]


def check(x: Tensor, keep: int, scores: Tensor | None = None) -> None:
    """Refuse shapes and counts that fit nothing.

    Raises:
        UserError: x is not (S, N, D), scores are not (S, N), keep is not within [1, N].
    """
    if x.ndim != 3:
        raise UserError(f"tokens of shape {tuple(x.shape)}; expected (samples, tokens, width)")
    if scores is not None and scores.shape != x.shape[:2]:
        raise UserError(
            f"scores of shape {tuple(scores.shape)} for tokens {tuple(x.shape)}; expected (samples, tokens)"
        )
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= x.shape[1]:
        raise UserError(f"keep={keep}; expected a whole number of tokens from 1 to {x.shape[1]}")


def ranked(scores: Tensor) -> Tensor:
    """(S, N) rows by descending score; of equal scores the lower row comes first (iLLaVA 3.1), on every device."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def top(scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Rows of the ``keep`` highest scores (S, keep), and the other rows (S, N - keep); both ascending."""
    order = ranked(scores)
    return order[:, :keep].sort(-1).values, order[:, keep:].sort(-1).values


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """(S, M, D) rows (S, M) of x (S, N, D).

    Whole rows are copied: ``gather`` with an expanded index, number by number, takes nine times as long on a CPU.
    """
    s, n = x.shape[:2]
    offset = torch.arange(s, device=x.device)[:, None]
    if not x.is_contiguous():
        return x[offset, rows]
    return x.view(s * n, -1).index_select(0, (rows + offset * n).flatten()).view(s, rows.shape[1], x.shape[2])


def wide(x: Tensor) -> Tensor:
    """What sums and similarities are computed in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def exact_dtype(x: Tensor) -> torch.dtype:
    """Dtype of ``wide(x)``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def masses(x: Tensor, sizes: Tensor | None) -> Tensor:
    """``sizes`` (S, N), or ones, in the dtype of ``wide(x)``."""
    if sizes is not None:
        return sizes.to(exact_dtype(x))
    return torch.ones(x.shape[:2], device=x.device, dtype=exact_dtype(x))


def add_rows(base: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    """Add row i of ``rows`` to row ``targets[i]`` of ``base``, in place.

    Args:
        base: (S, M, ...).
        targets: (S, R) int64 in [0, M).
        rows: (S, R, ...).

    Returns:
        ``base``. On CUDA the sum goes by sorted indices, so that its order, and with it the result, is always the same.
    """
    s, m = base.shape[:2]
    flat = (targets + torch.arange(s, device=base.device)[:, None] * m).flatten()
    into, what = base.view(s * m, *base.shape[2:]), rows.reshape(-1, *base.shape[2:])
    if base.is_cuda:
        into.index_put_((flat,), what, accumulate=True)
    else:
        into.index_add_(0, flat, what)
    return base


def join(base: Tensor, targets: Tensor, rows: Tensor, own: Tensor, mass: Tensor) -> Tensor:
    """Row ``targets[i]`` of ``base`` becomes the weighted mean of itself and all rows i that go there, in place.

    Written as base + sum mass_i (row_i - base) / total, which touches no row that nothing joins (or only mass 0).

    Args:
        base: (S, M, D), as ``wide``.
        targets: (S, R) int64 in [0, M).
        rows: (S, R, D), as ``wide``.
        own: (S, M) mass of each row of ``base``.
        mass: (S, R) mass of each of ``rows``.

    Returns:
        the total mass (S, M) of each row of ``base``.
    """
    total = add_rows(own.clone(), targets, mass)
    share = mass / total.gather(1, targets)
    share = torch.where(mass > 0, share, 0.0)
    add_rows(base, targets, (rows - gather_rows(base, targets)) * share[..., None])
    return total


def places(kept: Tensor, rows: Tensor) -> Tensor:
    """Output row of each of ``rows`` (S, R), all of which are in ``kept`` (S, M), ascending."""
    return torch.searchsorted(kept.contiguous(), rows.contiguous())


def owners(kept: Tensor, tokens: int) -> Tensor:
    """(S, N) int64 output row of each input row; -1 for those that are not in ``kept`` (S, M)."""
    s, m = kept.shape
    none = torch.full((s, tokens), -1, dtype=torch.int64, device=kept.device)
    return none.scatter_(1, kept, torch.arange(m, device=kept.device).expand(s, m))


def mean_weight(assign: Tensor, mass: Tensor, keep: int) -> Tensor:
    """(S, M, N) weights of means of the rows with one owner, each row in proportion to its mass; row sums 1.

    Args:
        assign: (S, N) owners in [0, M), all given.
        mass: (S, N) weights, such as sizes.
        keep: M.
    """
    s, n = assign.shape
    full = torch.zeros(s, keep, n, device=mass.device, dtype=mass.dtype)
    full.scatter_(1, assign[:, None], mass[:, None])
    return full / full.sum(-1, keepdim=True)


def identity(x: Tensor, sizes: Tensor | None = None) -> Reduced:
    """All rows stay: the same tensor, no copy."""
    rows = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    return Reduced(x=x, kept=rows, sizes=sizes, assign=rows)
