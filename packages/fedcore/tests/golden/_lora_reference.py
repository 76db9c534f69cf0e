"""The maths of low-rank adapters in float64 NumPy: one column at a time, always with the whole d x k product.

Nothing here imports the package under test or torch.
"""

import math

import numpy as np


def gram_schmidt(matrix, rank, order=None):
    """Orthonormal columns (m, rank) spanning the first ``rank`` columns, or those of ``order``, and coefficients.

    Each column is projected twice, which keeps the basis orthonormal; its norm is positive, hence the signs.
    """
    columns = range(rank) if order is None else order[:rank]
    basis = []
    for j in columns:
        rest = matrix[:, j].copy()
        for _ in range(2):
            for q in basis:
                rest = rest - q * float(q @ rest)
        basis.append(rest / math.sqrt(float(rest @ rest)))
    q = np.stack(basis, axis=1)
    return q, q.T @ matrix


def qr_init(weight, rank, scaling, rms=None):
    b, a = gram_schmidt(weight, rank)
    if rms is not None:
        target = rms * math.sqrt(weight.shape[0] * weight.shape[1])
        factor = math.sqrt(target / math.sqrt(((b @ a) ** 2).sum()))
        a, b = factor * a, factor * b
    return weight - scaling * b @ a, a, b


def product(factors, weights):
    """``sum_k p_k B_k A_k``, term by term."""
    total = np.zeros((factors[0][1].shape[0], factors[0][0].shape[1]))
    for (a, b), p in zip(factors, weights, strict=True):
        for i in range(a.shape[0]):
            total += p * np.outer(b[:, i], a[i])
    return total


def pivot_order(matrix, rank):
    """Columns by what is left of them after the ones before are projected out."""
    order = []
    for _ in range(rank):
        rest = matrix
        if order:
            q, _ = gram_schmidt(matrix, len(order), order)
            rest = matrix - q @ (q.T @ matrix)
        sizes = (rest**2).sum(axis=0)
        sizes[order] = -1.0
        order.append(int(np.argmax(sizes)))
    return order


def aggregate(factors, weights, rank, decomposition):
    """(A, B) of the sum at one rank, no larger than the rank of the sum."""
    delta = product(factors, weights)
    if decomposition == "qr":
        b, a = gram_schmidt(delta, rank)
        return a, b
    if decomposition == "qr_pivoted":
        b, a = gram_schmidt(delta, rank, pivot_order(delta, rank))
        return a, b
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    b, a = u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * v[:rank]
    for j in range(rank):
        if b[np.argmax(np.abs(b[:, j])), j] < 0:
            b[:, j], a[j] = -b[:, j], -a[j]
    return a, b


def layer(weight, bias, a, b, scaling, x):
    """Outputs (n, d) of the adapted layer, and gradients of ``sum(outputs^2) / 2`` with respect to A and B."""
    effective = weight + scaling * b @ a
    y = x @ effective.T + bias
    outer = y.T @ x
    return y, scaling * b.T @ outer, scaling * outer @ a.T
