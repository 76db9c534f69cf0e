"""Sharpness-aware methods in float64 NumPy, written from their formulas with plain loops.

Needs only the softmax regression of ``_softmax.py``, which is handed in. FedSpeed is written in the variables of its
authors' script (moves summed up, not dual variables), so that a slip in the sign or scale of either shows.
"""

from typing import NamedTuple

import numpy as np


class Result(NamedTuple):
    """``thetas[t]`` (P,) after round t; the states of server and clients at the end."""

    thetas: list
    server: dict
    clients: dict


class Setting(NamedTuple):
    """A problem, its cohorts, and what all methods have in common."""

    softmax: object
    problem: object
    cohorts: list
    lr: float = 0.1
    round_lr: str = "exp"
    weight_decay: float = 1e-3
    clip_grad: float = 10.0
    scale: float = 1.0
    max_steps: int = 0
    weighting: str = "uniform"

    def eta(self, t):
        if self.round_lr == "exp":
            return self.lr * 0.998 ** (t + 1)
        return self.lr if self.round_lr == "constant" else self.lr * np.cos(np.pi * t / len(self.cohorts) / 2) ** 2

    def batches(self, client):
        return self.softmax.batches(self.problem, client, max_steps=self.max_steps)

    def loss_grad(self, theta, batch):
        return self.softmax.gradient(theta, *batch, self.problem.classes, self.scale)

    def finish(self, grad, theta):
        """Clip the loss gradient, then decay."""
        return self.softmax.clipped(grad, self.clip_grad) + self.weight_decay * theta

    def mean(self, values, cohort):
        shares = self.softmax.weights(self.problem, cohort, self.weighting)
        return sum(share * values[client] for share, client in zip(shares, cohort, strict=True))


def ascent(theta, grad, r, a=None):
    """The perturbation: by the gradient, or by the gradient in units of the parameters."""
    size = np.ones_like(theta) if a is None else np.abs(theta) + a
    return r * size**2 * grad / np.linalg.norm(size * grad)


def sharp_grad(setting, theta, batch, r, a=None):
    """Gradient of a sharpness-aware step: clipped, with decay at theta."""
    eps = ascent(theta, setting.loss_grad(theta, batch), r, a)
    return setting.finish(setting.loss_grad(theta + eps, batch), theta)


def train(setting, theta, client, t, direction):
    """Local steps along ``direction(theta, batch)``."""
    for batch in setting.batches(client):
        theta = theta - setting.eta(t) * direction(theta, batch)
    return theta


def _averaging(setting, direction):
    """Methods that only change the local direction."""
    theta, thetas = setting.problem.start, []
    for t, cohort in enumerate(setting.cohorts):
        theta = setting.mean({i: train(setting, theta, i, t, direction) for i in cohort}, cohort)
        thetas.append(theta)
    return Result(thetas, {}, {})


def fedsam(setting, r=0.05):
    return _averaging(setting, lambda theta, batch: sharp_grad(setting, theta, batch, r))


def fedasam(setting, r=0.5, a=0.2):
    return _averaging(setting, lambda theta, batch: sharp_grad(setting, theta, batch, r, a))


def mofedsam(setting, r=0.1, beta=0.1):
    theta, thetas, delta = setting.problem.start, [], np.zeros_like(setting.problem.start)
    for t, cohort in enumerate(setting.cohorts):

        def direction(x, batch, delta=delta):
            return beta * sharp_grad(setting, x, batch, r) + (1 - beta) * delta

        new = setting.mean({i: train(setting, theta, i, t, direction) for i in cohort}, cohort)
        steps = sum(len(setting.batches(i)) for i in cohort) / len(cohort)
        delta = (theta - new) / (steps * setting.eta(t))
        theta = new
        thetas.append(theta)
    return Result(thetas, {"momentum": delta}, {})


def fedlesam(setting, r=0.05):
    theta, thetas, seen = setting.problem.start, [], {}
    for t, cohort in enumerate(setting.cohorts):
        ends = {}
        for i in cohort:
            eps = np.zeros_like(theta)
            if i in seen and np.linalg.norm(seen[i] - theta) > 0:
                eps = r * (seen[i] - theta) / np.linalg.norm(seen[i] - theta)

            def direction(x, batch, eps=eps):
                return setting.finish(setting.loss_grad(x + eps, batch), x)

            ends[i] = train(setting, theta, i, t, direction)
            seen[i] = theta
        theta = setting.mean(ends, cohort)
        thetas.append(theta)
    return Result(thetas, {}, {i: {"last": last, "seen": np.ones(1)} for i, last in seen.items()})


def fedgamma(setting, r=0.05):
    theta, thetas, zeros = setting.problem.start, [], np.zeros_like(setting.problem.start)
    server, own = zeros, {}
    for t, cohort in enumerate(setting.cohorts):
        ends, changes = {}, {}
        for i in cohort:
            met, before = [], own.get(i, zeros)

            def direction(x, batch, met=met, before=before, server=server):
                met.append(sharp_grad(setting, x, batch, r))
                return met[-1] - before + server

            ends[i] = train(setting, theta, i, t, direction)
            own[i] = np.mean(met, axis=0)  # what option II comes to, without its formula
            changes[i] = own[i] - before
        server = server + len(cohort) / setting.problem.clients * setting.mean(changes, cohort)
        theta = setting.mean(ends, cohort)
        thetas.append(theta)
    return Result(thetas, {"c": server}, {i: {"c": value} for i, value in own.items()})


def fednsam(setting, r=0.05, lam=0.85, b=0.0):
    theta, thetas, m = setting.problem.start, [], np.zeros_like(setting.problem.start)
    for t, cohort in enumerate(setting.cohorts):
        look = theta + lam * m

        def direction(x, batch, look=look):
            return sharp_grad(setting, x, batch, r) + b * (x - look)

        reached = setting.mean({i: train(setting, look, i, t, direction) for i in cohort}, cohort)
        m = lam * m + (reached - look)
        theta = theta + m
        thetas.append(theta)
    return Result(thetas, {"m": m}, {})


def fedspeed(setting, r=0.1, alpha=1.0, lam=10.0, dual_mean="all"):
    theta, thetas, zeros = setting.problem.start, [], np.zeros_like(setting.problem.start)
    moved = {i: zeros for i in range(setting.problem.clients)}
    met = set()
    for t, cohort in enumerate(setting.cohorts):
        ends = {}
        for i in cohort:

            def direction(x, batch, start=theta, past=moved[i]):
                plain = setting.loss_grad(x, batch)
                ahead = setting.loss_grad(x + ascent(x, plain, r), batch)
                return setting.finish((1 - alpha) * plain + alpha * ahead, x) + (x - start) / lam + past / lam

            ends[i] = train(setting, theta, i, t, direction)
            moved[i] = moved[i] + (ends[i] - theta)
        met |= set(cohort)
        if dual_mean == "cohort":
            theta = setting.mean({i: ends[i] + moved[i] for i in cohort}, cohort)
        else:
            theta = setting.mean(ends, cohort) + np.mean(list(moved.values()), axis=0)
        thetas.append(theta)
    server = {} if dual_mean == "cohort" else {"h": -np.mean(list(moved.values()), axis=0) / lam}
    return Result(thetas, server, {i: {"h": -moved[i] / lam} for i in met})
