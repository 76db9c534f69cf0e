"""FedMuon in float64 NumPy, tensor by tensor, client by client, from the text of the specification.

Nothing here uses torch or the code under test. Parameters are lists of arrays; the caller says which are matrices.
"""

from dataclasses import dataclass, field

import numpy as np

QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5
POLAR = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def polynomial(s, orth):
    """Composed scalar map of the iterations, for singular values over the norm of the matrix."""
    for a, b, c in QUINTIC if orth == "quintic" else POLAR:
        s = a * s + b * s**3 + c * s**5
    return s


def orthogonalised(u, orth):
    """O(U) of one matrix, by its singular value decomposition: no iteration on matrices at all."""
    left, s, right = np.linalg.svd(u, full_matrices=False)
    norm = np.sqrt(np.sum(s**2))
    if orth == "svd":
        return (left * (s > 1e-12 * max(s[0], 1e-300))) @ right
    scaled = s / (norm + 1e-7) if orth == "quintic" else s / (1.02 * norm + 1e-6)
    return (left * polynomial(scaled, orth)) @ right


def matrices(tensor):
    """The matrices of a tensor: 3-D tensors are stacks, tensors of more dimensions are flattened behind the first."""
    if tensor.ndim == 3:
        return list(tensor)
    return [tensor.reshape(tensor.shape[0], -1)]


def muon_direction(u, orth, conv_scale):
    """c(shape) * O(U) of a tensor of any shape."""
    found = []
    for matrix in matrices(u):
        rows, cols = u.shape[-2:] if conv_scale == "official" else matrix.shape
        c = 1.0 if conv_scale == "none" else np.sqrt(max(1.0, rows / cols))
        found.append(c * orthogonalised(matrix, orth))
    return np.stack(found).reshape(u.shape)


def compressed(m, q):
    """Best approximation of rank floor(q m n / (m + n + 1)), at least 1; the whole matrix if factors are no smaller."""
    found = []
    for matrix in matrices(m):
        rows, cols = matrix.shape
        rank = max(1, int(np.floor(q * rows * cols / (rows + cols + 1))))
        if q < 1 and rank * (rows + cols + 1) < rows * cols:
            left, s, right = np.linalg.svd(matrix, full_matrices=False)
            matrix = left[:, :rank] @ np.diag(s[:rank]) @ right[:rank]
        found.append(matrix)
    return np.stack(found).reshape(m.shape)


@dataclass
class Options:
    """Options of the method, defaults of the specification."""

    lr: float = 3e-4
    weight_decay: float = 0.01
    clip_grad: float = 10.0
    gamma: float = 0.5
    beta: float = 0.98
    nesterov: bool = True
    mu_lr: float = 10.0
    orth: str = "quintic"
    conv_scale: str = "flattened"
    aggregate_momentum: bool = True
    align: bool = True
    momentum_rank_ratio: float = 0.0
    round_lr: str = "cosine"


@dataclass
class Result:
    """Parameters, mean momentum and direction after each round, lists of lists of arrays."""

    params: list = field(default_factory=list)
    momentum: list = field(default_factory=list)
    direction: list = field(default_factory=list)


def rate_of(o, r, rounds):
    if o.round_lr == "constant":
        return o.lr
    return o.lr * (1 + np.cos(np.pi * r / rounds)) / 2


def local(x, mbar, direction, batches, gradient, is_matrix, eta, o):
    """x_K, M_K of one client; ``gradient(x, batch)`` is a list of arrays."""
    x, m = [t.copy() for t in x], [t.copy() for t in mbar]
    first, second = [np.zeros_like(t) for t in x], [np.zeros_like(t) for t in x]
    gamma = o.gamma if o.align else 0.0
    for k, batch in enumerate(batches, start=1):
        g = gradient(x, batch)
        norm = np.sqrt(sum(np.sum(t**2) for t in g))
        if o.clip_grad and norm > o.clip_grad:
            g = [t * (o.clip_grad / norm) for t in g]
        for i in range(len(x)):
            if is_matrix[i]:
                m[i] = o.beta * m[i] + (1 - o.beta) * g[i]
                u = (1 - o.beta) * g[i] + o.beta * m[i] if o.nesterov else m[i]
                h = eta * o.mu_lr * (1 - gamma)
                x[i] = (1 - h * o.weight_decay) * x[i] - h * muon_direction(u, o.orth, o.conv_scale)
            else:
                first[i] = 0.9 * first[i] + 0.1 * g[i]
                second[i] = 0.95 * second[i] + 0.05 * g[i] ** 2
                h = eta * (1 - gamma)
                root = np.sqrt(second[i] / (1 - 0.95**k)) + 1e-10
                x[i] = (1 - h * o.weight_decay) * x[i] - h * (first[i] / (1 - 0.9**k)) / root
            x[i] = x[i] - gamma * eta * direction[i]
    return x, m


def fedmuon(start, batches, gradient, is_matrix, cohorts, o, weights=None):
    """The whole training.

    ``start``: list of arrays; ``batches[i]``: list of batches that client i takes in every round; ``is_matrix``: for
    each tensor whether it is orthogonalised; ``weights(cohort)``: shares of the clients (default: equal).
    """
    x, found = [t.copy() for t in start], Result()
    mbar, direction = [np.zeros_like(t) for t in x], [np.zeros_like(t) for t in x]
    for r, cohort in enumerate(cohorts):
        eta = rate_of(o, r, len(cohorts))
        shares = weights(cohort) if weights else np.full(len(cohort), 1 / len(cohort))
        uploads = [local(x, mbar, direction, batches[i], gradient, is_matrix, eta, o) for i in cohort]
        steps = np.mean([len(batches[i]) for i in cohort])
        mean = [sum(w * (u[0][i] - x[i]) for w, u in zip(shares, uploads, strict=True)) for i in range(len(x))]
        x = [a + b for a, b in zip(x, mean, strict=True)]
        direction = [-d / (steps * eta) for d in mean]
        if o.aggregate_momentum:
            q = o.momentum_rank_ratio
            sent = [[compressed(t, q) if q and is_matrix[i] else t for i, t in enumerate(u[1])] for u in uploads]
            mbar = [sum(w * m[i] for w, m in zip(shares, sent, strict=True)) for i in range(len(x))]
        found.params.append(x)
        found.momentum.append(mbar)
        found.direction.append(direction)
    return found


def split(flat, shapes):
    """A flat vector as a list of arrays."""
    parts, at = [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        parts.append(flat[at : at + size].reshape(shape))
        at += size
    return parts


def flat(tensors, chosen=None):
    """Concatenation of all tensors, or of the chosen ones."""
    kept = [t.ravel() for i, t in enumerate(tensors) if chosen is None or chosen[i]]
    return np.concatenate(kept) if kept else np.zeros(0)
