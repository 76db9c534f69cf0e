"""Softmax regression in float64 NumPy: the model, the data and the order of the batches of all golden trajectories.

Nothing here uses torch or the code under test. ``theta`` is ``concat(weight (C, d) row by row, bias (C,))``, which is
the flat vector of ``nn.Linear(d, C)``.
"""

from typing import NamedTuple

import numpy as np

SIZES = (5, 12, 8, 3, 10)
BATCH, EPOCHS = 4, 2
"""With these, K is 4, 6, 4, 2, 6: no two neighbours alike, last batches of 1, 4, 4, 3 and 2 samples."""


class Problem(NamedTuple):
    """Clients with their samples.

    ``inputs[i]`` (n_i, d) float64 and ``targets[i]`` (n_i,) int64 of client i; ``start`` (P,) initial parameters.
    """

    inputs: list
    targets: list
    start: np.ndarray
    classes: int

    @property
    def clients(self):
        return len(self.inputs)

    @property
    def sizes(self):
        return np.array([len(y) for y in self.targets])

    @property
    def everyone(self):
        return list(range(self.clients))


def make(seed=0, sizes=SIZES, dim=4, classes=3):
    """Clients of unequal sizes whose classes and inputs differ: drift is large."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, dim))
    inputs, targets = [], []
    for size in sizes:
        y = rng.choice(classes, size=size, p=rng.dirichlet([0.5] * classes))
        inputs.append(centres[y] + rng.normal(size=dim) + 0.7 * rng.normal(size=(size, dim)))
        targets.append(y.astype(np.int64))
    return Problem(inputs, targets, 0.3 * rng.normal(size=classes * (dim + 1)), classes)


def loss(theta, x, y, classes, scale=1.0):
    """``scale`` times the mean cross-entropy."""
    logits = _logits(theta, x, classes)
    top = logits.max(axis=1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    return scale * np.mean(log_sum - logits[np.arange(len(y)), y])


def gradient(theta, x, y, classes, scale=1.0):
    """Gradient (P,) of ``loss``: no clipping, no weight decay."""
    logits = _logits(theta, x, classes)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(y)), y] -= 1.0
    p *= scale / len(y)
    return np.concatenate([(p.T @ x).ravel(), p.sum(axis=0)])


def batches(problem, client, batch_size=BATCH, epochs=EPOCHS, max_steps=0):
    """The batches ``(x, y)`` of a round in stored order; the last one of an epoch may be short."""
    x, y = problem.inputs[client], problem.targets[client]
    found = [(x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, len(y), batch_size)] * epochs
    return found[:max_steps] if max_steps else found


def full_gradient(theta, problem, client, scale=1.0):
    """Gradient (P,) over all samples of a client: no clipping, no weight decay."""
    return gradient(theta, problem.inputs[client], problem.targets[client], problem.classes, scale)


def clipped(grad, bound):
    """``grad`` with a norm of at most ``bound`` (0: as it is)."""
    norm = np.sqrt(np.sum(grad * grad))
    return grad * (bound / norm) if bound and norm > bound else grad


def weights(problem, cohort, weighting="uniform"):
    """Weights of the clients of a cohort; they sum to 1."""
    raw = problem.sizes[list(cohort)].astype(float) if weighting == "samples" else np.ones(len(cohort))
    return raw / raw.sum()


def average(arrays, shares):
    """Weighted sum of arrays, in the order given."""
    total = np.zeros_like(arrays[0])
    for array, share in zip(arrays, shares, strict=True):
        total = total + share * array
    return total


def _logits(theta, x, classes):
    dim = x.shape[1]
    return x @ theta[: classes * dim].reshape(classes, dim).T + theta[classes * dim :]
