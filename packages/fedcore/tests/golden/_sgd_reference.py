"""FedAvg and the methods on local SGD in float64 NumPy, written from their formulas: loops over clients and steps.

Nothing is shared with the code under test: no state trees, no running reductions, no closed form of the sum of rates.
Every function returns a ``Result``.
"""

from typing import NamedTuple

import numpy as np


class Result(NamedTuple):
    """``thetas[t]`` (P,) after round t, ``shown[t]`` what is evaluated, states of server and clients at the end."""

    thetas: list
    shown: list
    server: dict
    clients: dict


class World:
    """A problem, who takes part when, and everything about plain local SGD."""

    def __init__(self, softmax, problem, cohorts, **options):
        self.softmax, self.problem, self.cohorts = softmax, problem, cohorts
        defaults = {
            "lr": 0.1,
            "round_lr": "exp",
            "lr_decay": 0.998,
            "weight_decay": 1e-3,
            "clip_grad": 10.0,
            "scale": 1.0,
            "batch_size": softmax.BATCH,
            "epochs": softmax.EPOCHS,
            "max_steps": 0,
            "weighting": "uniform",
        }
        assert not set(options) - set(defaults)
        self.__dict__ |= defaults | options

    @property
    def rounds(self):
        return len(self.cohorts)

    @property
    def zeros(self):
        return np.zeros_like(self.problem.start)

    def rate(self, t):
        if self.round_lr == "constant":
            return self.lr
        if self.round_lr == "cosine":
            return 0.5 * self.lr * (1 + np.cos(np.pi * t / self.rounds))
        eta = self.lr
        for _ in range(t + 1):
            eta = eta * self.lr_decay
        return eta

    def batches(self, client):
        return self.softmax.batches(self.problem, client, self.batch_size, self.epochs, self.max_steps)

    def decayed(self, grad, theta):
        return self.softmax.clipped(grad, self.clip_grad) + self.weight_decay * theta

    def grad(self, theta, batch):
        return self.decayed(self.softmax.gradient(theta, *batch, self.problem.classes, self.scale), theta)

    def full_grad(self, theta, client):
        return self.decayed(self.softmax.full_gradient(theta, self.problem, client, self.scale), theta)

    def mean(self, values, cohort):
        """Mean of ``values[client]`` over a cohort, in the weights of the run."""
        shares = self.softmax.weights(self.problem, cohort, self.weighting)
        return self.softmax.average([values[i] for i in cohort], shares)

    def local(self, theta, client, direction, rates):
        """Local steps ``theta - rates[k] * direction(theta, batch)``."""
        for batch, eta in zip(self.batches(client), rates, strict=True):
            theta = theta - eta * direction(theta, batch)
        return theta

    def steady(self, client, t):
        return [self.rate(t)] * len(self.batches(client))


def fedavg(world):
    theta, thetas = world.problem.start, []
    for t, cohort in enumerate(world.cohorts):
        ends = {i: world.local(theta, i, world.grad, world.steady(i, t)) for i in cohort}
        theta = world.mean(ends, cohort)
        thetas.append(theta)
    return Result(thetas, thetas, {}, {})


def server_swa(world, share=0.25):
    thetas = fedavg(world).thetas
    late = max(1, round(share * world.rounds))
    first = world.rounds - late
    shown = [theta if t < first else np.mean(thetas[first : t + 1], axis=0) for t, theta in enumerate(thetas)]
    return Result(thetas, shown, {"mean": shown[-1], "count": np.array(late)}, {})


def fedprox(world, mu=0.01):
    theta, thetas = world.problem.start, []
    for t, cohort in enumerate(world.cohorts):
        ends = {}
        for i in cohort:
            ends[i] = world.local(
                theta, i, lambda x, batch, anchor=theta: world.grad(x, batch) + mu * (x - anchor), world.steady(i, t)
            )
        theta = world.mean(ends, cohort)
        thetas.append(theta)
    return Result(thetas, thetas, {}, {})


def scaffold(world):
    theta, thetas, c = world.problem.start, [], world.zeros
    own = {}
    for t, cohort in enumerate(world.cohorts):
        ends, change = {}, {}
        for i in cohort:
            ci, rates = own.get(i, world.zeros), world.steady(i, t)
            ends[i] = world.local(theta, i, lambda x, batch, ci=ci, c=c: world.grad(x, batch) - ci + c, rates)
            own[i] = ci - c + (theta - ends[i]) / (len(rates) * world.rate(t))
            change[i] = own[i] - ci
        c = c + len(cohort) / world.problem.clients * world.mean(change, cohort)
        theta = world.mean(ends, cohort)
        thetas.append(theta)
    return Result(thetas, thetas, {"c": c}, {i: {"c": ci} for i, ci in own.items()})


def fedcm(world, beta=0.1):
    theta, thetas, move = world.problem.start, [], world.zeros
    for t, cohort in enumerate(world.cohorts):
        ends = {}
        for i in cohort:
            ends[i] = world.local(
                theta,
                i,
                lambda x, batch, move=move: beta * world.grad(x, batch) + (1 - beta) * move,
                world.steady(i, t),
            )
        new = world.mean(ends, cohort)
        steps = np.mean([len(world.batches(i)) for i in cohort])
        move = (theta - new) / (steps * world.rate(t))
        theta = new
        thetas.append(theta)
    return Result(thetas, thetas, {"momentum": move}, {})


def fedacg(world, lam=0.85, b=0.01):
    theta, thetas, m = world.problem.start, [], world.zeros
    for t, cohort in enumerate(world.cohorts):
        look, moves = theta + lam * m, {}
        for i in cohort:
            end = world.local(
                look, i, lambda x, batch, look=look: world.grad(x, batch) + b * (x - look), world.steady(i, t)
            )
            moves[i] = end - look
        m = lam * m + world.mean(moves, cohort)
        theta = theta + m
        thetas.append(theta)
    return Result(thetas, thetas, {"m": m}, {})


def feddyn(world, a=0.01):
    theta, thetas, h = world.problem.start, [], world.zeros
    own = {}
    for t, cohort in enumerate(world.cohorts):
        ends = {}
        for i in cohort:
            hi = own.get(i, world.zeros)
            ends[i] = world.local(
                theta,
                i,
                lambda x, batch, hi=hi, anchor=theta: world.grad(x, batch) - hi + a * (x - anchor),
                world.steady(i, t),
            )
            own[i] = hi - a * (ends[i] - theta)
        middle = world.mean(ends, cohort)
        h = h - a / world.problem.clients * len(cohort) * (middle - theta)
        theta = middle - h / a
        thetas.append(theta)
    return Result(thetas, thetas, {"h": h}, {i: {"h": hi} for i, hi in own.items()})


def decaying(world, client, t, rho):
    """The rates of a round, eq. 3 as printed."""
    eta, steps = world.rate(t), len(world.batches(client))
    return [eta * (1 - k / steps) + k / steps * rho * eta for k in range(steps)]


def fedswa(world, rho=0.1, alpha=1.5):
    theta, thetas = world.problem.start, []
    for t, cohort in enumerate(world.cohorts):
        ends = {i: world.local(theta, i, world.grad, decaying(world, i, t, rho)) for i in cohort}
        theta = theta + alpha * (world.mean(ends, cohort) - theta)
        thetas.append(theta)
    return Result(thetas, thetas, {}, {})


def fedmoswa(world, rho=0.1, alpha=1.5, gamma=0.2, first_round_gamma=None, option="II", divisor="exact"):
    theta, thetas, m = world.problem.start, [], world.zeros
    own = {}
    for t, cohort in enumerate(world.cohorts):
        ends = {}
        for i in cohort:
            ci, rates = own.get(i, world.zeros), decaying(world, i, t, rho)
            ends[i] = world.local(theta, i, lambda x, batch, ci=ci, m=m: world.grad(x, batch) - ci + m, rates)
            if option == "I":
                own[i] = world.full_grad(theta, i)
            else:
                total = sum(rates) if divisor == "exact" else len(rates) * world.rate(t) * (1 + rho) / 2
                own[i] = ci - m + (theta - ends[i]) / total
        g = first_round_gamma if t == 0 and first_round_gamma is not None else gamma
        m = (1 - g) * m + g * world.mean(own, cohort)
        theta = theta + alpha * (world.mean(ends, cohort) - theta)
        thetas.append(theta)
    return Result(thetas, thetas, {"m": m}, {i: {"c": ci} for i, ci in own.items()})
