"""Exact averages of low-rank products: factors of unequal ranks concatenated, factored again, cut for each client.

The sum ``sum_k p_k B_k A_k`` is the product of the concatenated factors, without a cross term. The thin path factors
those and never makes the d x k matrix: O((d + k) r_tot^2) instead of O(d k min(d, k)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcore.lora.init import check_rank, computing, leading_qr

__all__ = ["Decomposition", "Factors", "aggregate_concat_qr", "pad_columns", "pad_rows", "residual_factors"]

Factors = tuple[Tensor, Tensor]
"""A (r, k) and B (d, r) of one layer."""
Decomposition = Literal["qr", "qr_pivoted", "svd"]


@torch.no_grad()
def aggregate_concat_qr(
    factors: Sequence[Factors],
    weights: Sequence[float],
    target_ranks: Sequence[int],
    decomposition: Decomposition = "qr",
    thin: bool = True,
) -> list[Factors]:
    """Factors of ``sum_k p_k B_k A_k`` at each of the target ranks.

    Args:
        factors: (A_k (r_k, k), B_k (d, r_k)) of the clients.
        weights: p_k, taken as they are (an average where they sum to one).
        target_ranks: ranks to return, each 1 to min(d, k).
        decomposition: how the product is cut to a rank r.
            ``qr`` (the paper): no pivoting; the first r columns are exact, the others projected on their span.
            ``qr_pivoted``: columns in the order of what is left of them; mostly a smaller error than ``qr``.
            ``svd``: the best approximation of that rank (FlexLoRA), B = U S^(1/2), A = S^(1/2) V^T.
        thin: False makes the d x k matrix and factors that, as the authors' script does.

    Returns:
        (A, B) for each target rank, in the number format of the first client's A; computed in float32 or more. A
        smaller rank has the first rows and columns of a larger one. All is exact where r >= sum of r_k. Signs are
        canonical (diag(R) >= 0; svd: the largest entry of a column of B is positive). Directions that the sum does not
        have (r above its rank) get a zero row of A and a column of B orthonormal to the others, so that they can be
        trained.

    Raises:
        RankError: a target rank out of its range.
        ValueError: no factors, shapes that do not fit each other, or values that are not finite.

    Source: ILoRA (arXiv 2511.16069) 5.2; thin path and the two other decompositions are ours. Where the first r_tot
    columns of the product are dependent, the thin path is still exact at r_tot; the dense one is not.
    """
    if decomposition not in get_args(Decomposition):
        raise ValueError(f"decomposition={decomposition!r}; expected one of {', '.join(get_args(Decomposition))}")
    a, b = residual_factors(factors, weights)
    for rank in target_ranks:
        check_rank(rank, b.shape[0], a.shape[1])
    if not target_ranks:
        return []
    largest = max(target_ranks)
    if thin:
        basis, core = _compressed(a, b, largest)
        left, right = _DECOMPOSE[decomposition](core, largest)
        left = basis @ left
    else:
        left, right = _dense(b @ a, largest, decomposition)
    if decomposition == "svd":
        sign = _sign(left)
        left, right = left * sign, right * sign.unsqueeze(1)
    dtype = factors[0][0].dtype
    left, right = left.to(dtype), right.to(dtype)
    whole = torch.contiguous_format
    return [(right[:r].clone(memory_format=whole), left[:, :r].clone(memory_format=whole)) for r in target_ranks]


def residual_factors(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Concatenated factors of the exact sum: ``B_c A_c = sum_k p_k B_k A_k``.

    Args:
        factors: (A_k (r_k, k), B_k (d, r_k)) of the clients.
        weights: p_k; they go on A alone.

    Returns:
        A_c (sum of r_k, k) and B_c (d, sum of r_k), in float32 or more.

    Raises:
        ValueError: no factors, shapes that do not fit each other, or values that are not finite.
    """
    _check(factors, weights)
    dtype = computing(factors[0][0])
    a = torch.cat([p * a.to(dtype) for (a, _), p in zip(factors, weights, strict=True)])
    b = torch.cat([b.to(dtype) for _, b in factors], dim=1)
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        bad = [i for i, pair in enumerate(factors) if not all(bool(torch.isfinite(x).all()) for x in pair)]
        raise ValueError(f"factors {bad} or their weights are not finite; leave those clients out")
    return a, b


def pad_rows(a: Tensor, rank: int) -> Tensor:
    """The first ``rank`` rows of A (r, ...), with rows of zeros where it has fewer."""
    missing = rank - a.shape[0]
    return torch.cat([a, a.new_zeros(missing, *a.shape[1:])]) if missing > 0 else a[:rank]


def pad_columns(b: Tensor, rank: int) -> Tensor:
    """The first ``rank`` columns of B (d, r), with columns of zeros where it has fewer."""
    missing = rank - b.shape[1]
    return F.pad(b, (0, missing)) if missing > 0 else b[:, :rank]


# ---------------------------------------------------------------------------------------------- pieces


def _check(factors: Sequence[Factors], weights: Sequence[float]) -> None:
    if not factors or len(factors) != len(weights):
        raise ValueError(f"{len(factors)} pairs of factors and {len(weights)} weights; expected one weight a pair")
    for i, (a, b) in enumerate(factors):
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"factors {i} have the shapes {tuple(a.shape)} and {tuple(b.shape)}; expected (r, k) and (d, r)"
            )
        if (b.shape[0], a.shape[1]) != (factors[0][1].shape[0], factors[0][0].shape[1]):
            raise ValueError(f"factors {i} are of another layer: {b.shape[0]}x{a.shape[1]}")


def _compressed(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal basis (d, m) and core (m, k) of the product B A, with m >= rank where d allows.

    Zero columns complete B, for which Householder's Q has further orthonormal columns.
    """
    basis, r = torch.linalg.qr(pad_columns(b, max(rank, b.shape[1])))
    return basis, r[:, : a.shape[0]] @ a


def _qr(matrix: Tensor, rank: int) -> Factors:
    return leading_qr(matrix, rank)


def _qr_pivoted(matrix: Tensor, rank: int) -> Factors:
    """QR of the columns that are the largest, each after the ones before are projected out; R in the old order."""
    chosen = _pivots(matrix, rank)
    q, r = torch.linalg.qr(matrix[:, chosen])
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(r)
    return q, q.mT @ matrix


def _pivots(matrix: Tensor, rank: int) -> Tensor:
    """Indices (rank,) of the columns that greedy pivoting takes; the first of equals."""
    left, chosen = matrix.clone(), []
    norms = left.square().sum(dim=0)
    for _ in range(rank):
        index = int(norms.argmax())
        chosen.append(index)
        column = left[:, index]
        size = column.square().sum()
        if float(size) > 0:
            left -= torch.outer(column, (column @ left) / size)
        norms = left.square().sum(dim=0)
        norms[chosen] = -1.0
    return torch.tensor(chosen, device=matrix.device)


def _svd(matrix: Tensor, rank: int) -> Factors:
    """Balanced factors of the best approximation."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    there = s > torch.finfo(s.dtype).eps * max(matrix.shape) * s[0]
    root = s.sqrt()
    return u * torch.where(there, root, 1.0), torch.where(there, root, 0.0).unsqueeze(1) * v


def _dense(matrix: Tensor, rank: int, decomposition: Decomposition) -> Factors:
    """The same of the d x k matrix; ``qr`` by one factorisation of all of it, as the paper has it."""
    if decomposition != "qr":
        return _DECOMPOSE[decomposition](matrix, rank)
    q, r = torch.linalg.qr(matrix)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r)
    return (q * sign)[:, :rank], (r * sign.unsqueeze(1))[:rank]


def _sign(columns: Tensor) -> Tensor:
    """Sign of the largest entry of each column."""
    largest = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    return torch.where(largest < 0, -1.0, 1.0).to(columns)


_DECOMPOSE: dict[str, Callable[[Tensor, int], Factors]] = {"qr": _qr, "qr_pivoted": _qr_pivoted, "svd": _svd}
"""matrix (m, k), rank r -> left (m, r), right (r, k)"""
