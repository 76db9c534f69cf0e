"""FedAdam, FedYogi and FedAdagrad in float64 NumPy: local SGD, then one loop over the coordinates on the server.

Needs only the softmax regression of ``_softmax.py``, which is handed in.
"""

import math

import numpy as np


def mean_move(softmax, problem, theta, cohort, eta, weight_decay, clip_grad, weighting):
    """Mean of the clients' moves under SGD at a constant rate."""
    moves = []
    for client in cohort:
        x = theta
        for batch in softmax.batches(problem, client):
            grad = softmax.clipped(softmax.gradient(x, *batch, problem.classes), clip_grad)
            x = x - eta * (grad + weight_decay * x)
        moves.append(x - theta)
    return softmax.average(moves, softmax.weights(problem, cohort, weighting))


def second_moment(kind, v, d, b2):
    """New v of one coordinate."""
    if kind == "fedadagrad":
        return v + d * d
    if kind == "fedadam":
        return b2 * v + (1 - b2) * d * d
    if v > d * d:
        return v - (1 - b2) * d * d
    return v + (1 - b2) * d * d if v < d * d else v


def factor(kind, t, b1, b2):
    """Bias correction of the rate in round t = 0, 1, …"""
    first = 1 - b1 ** (t + 1)
    return 1 / first if kind == "fedadagrad" else math.sqrt(1 - b2 ** (t + 1)) / first


def run(
    kind,
    softmax,
    problem,
    cohorts,
    *,
    lr=0.1,
    lr_decay=0.998,
    weight_decay=1e-3,
    clip_grad=10.0,
    weighting="uniform",
    eta_s=0.01,
    b1=None,
    b2=0.99,
    tau=1e-3,
    v0=None,
    bias_correction=False,
):
    """Parameters after every round, and m and v at the end."""
    b1 = (0.0 if kind == "fedadagrad" else 0.9) if b1 is None else b1
    theta, thetas = problem.start.copy(), []
    m, v = [0.0] * len(theta), [tau * tau if v0 is None else v0] * len(theta)
    for t, cohort in enumerate(cohorts):
        move = mean_move(softmax, problem, theta, cohort, lr * lr_decay ** (t + 1), weight_decay, clip_grad, weighting)
        rate = eta_s * (factor(kind, t, b1, b2) if bias_correction else 1.0)
        theta = theta.copy()
        for j, d in enumerate(move):
            m[j] = b1 * m[j] + (1 - b1) * d
            v[j] = second_moment(kind, v[j], d, b2)
            theta[j] += rate * m[j] / (math.sqrt(v[j]) + tau)
        thetas.append(theta)
    return thetas, np.array(m), np.array(v)
