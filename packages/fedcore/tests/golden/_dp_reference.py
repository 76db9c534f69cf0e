"""The private methods in float64 NumPy, written from their formulas: loops over clients, one sum, injected noise.

Nothing is shared with the code under test. Smoothing solves the linear system instead of dividing frequencies; the
noise of a round is an array that the test hands to both sides.
"""

from typing import NamedTuple

import numpy as np


class Result(NamedTuple):
    """``thetas[t]`` (P,) after round t, and states of server and clients at the end."""

    thetas: list
    server: dict
    clients: dict


class World:
    """A problem, who takes part when (perhaps nobody), and what the mechanism does.

    ``noise[t]`` (2 P,) standard normals of round t; an upload takes as many of them as it has numbers, from the front.
    """

    def __init__(self, softmax, problem, cohorts, noise, *, clip, sigma, rate, steps, lr=0.1, decay=0.998, wd=1e-3):
        self.softmax, self.problem, self.cohorts, self.noise = softmax, problem, cohorts, noise
        self.clip, self.sigma, self.steps, self.wd = clip, sigma, steps, wd
        self.lr, self.decay, self.step_clip = lr, decay, 10.0
        self.expected = rate * problem.clients  # m = q N

    @property
    def zeros(self):
        return np.zeros_like(self.problem.start)

    @property
    def tensors(self):
        """Spans of weight and bias."""
        size = len(self.problem.start)
        return [(0, size - self.problem.classes), (size - self.problem.classes, size)]

    def rate(self, t):
        return self.lr * self.decay ** (t + 1)

    def batches(self, client):
        return self.softmax.batches(self.problem, client, self.softmax.BATCH, self.steps, self.steps)

    def loss_grad(self, theta, batch):
        """As the loss has it: neither clipped nor decayed."""
        return self.softmax.gradient(theta, *batch, self.problem.classes)

    def grad(self, theta, batch):
        return self.softmax.clipped(self.loss_grad(theta, batch), self.step_clip) + self.wd * theta

    def sam(self, theta, batch, r):
        ascent = self.loss_grad(theta, batch)
        point = theta + r * ascent / np.sqrt(np.sum(ascent**2))
        return self.softmax.clipped(self.loss_grad(point, batch), self.step_clip) + self.wd * theta

    def local(self, theta, client, t, direction):
        """K steps along ``direction(theta, batch)``."""
        for batch in self.batches(client):
            theta = theta - self.rate(t) * direction(theta, batch)
        return theta

    def release(self, t, uploads, size):
        """Noisy sum of clipped uploads (size,) over the expected cohort, fixed whoever came."""
        total = np.zeros(size)
        for upload in uploads:
            norm = np.sqrt(np.sum(upload * upload))
            total = total + upload * (1.0 if norm <= self.clip else self.clip / norm)
        if self.sigma:
            total = total + self.sigma * self.clip * self.noise[t][:size]
        return total / self.expected

    def smoothed(self, vector, s):
        """Each tensor by itself: solve ``(I - s L) x = v`` with the periodic second difference L."""
        parts = []
        for start, stop in self.tensors:
            size = stop - start
            eye = np.eye(size)
            second = np.roll(eye, 1, axis=0) + np.roll(eye, -1, axis=0) - 2 * eye
            parts.append(np.linalg.solve(eye - s * second, vector[start:stop]))
        return np.concatenate(parts)

    def largest(self, vector, share):
        """The largest entries of each tensor, others zero."""
        kept = np.zeros_like(vector)
        for start, stop in self.tensors:
            count = int(np.ceil(share * (stop - start)))
            order = start + np.argsort(-np.abs(vector[start:stop]), kind="stable")[:count]
            kept[order] = vector[order]
        return kept


def _averaged(world, direction, upload=lambda world, delta: delta, server_momentum=0.0, smoothing=0.0):
    """DP-FedAvg with any local direction and any change of the upload."""
    theta, momentum, thetas = world.problem.start, world.zeros, []
    for t, cohort in enumerate(world.cohorts):
        moves = [upload(world, world.local(theta, i, t, direction(theta)) - theta) for i in cohort]
        move = world.smoothed(world.release(t, moves, len(theta)), smoothing)
        momentum = server_momentum * momentum + move
        theta = theta + momentum
        thetas.append(theta)
    return Result(thetas, {"momentum": momentum} if server_momentum else {}, {})


def dp_fedavg(world, server_momentum=0.0, smoothing=0.0):
    return _averaged(world, lambda anchor: world.grad, server_momentum=server_momentum, smoothing=smoothing)


def dp_fedsam(world, r=0.05, topk=1.0):
    return _averaged(
        world, lambda anchor: lambda x, b: world.sam(x, b, r), lambda world, delta: world.largest(delta, topk)
    )


def dp_blur(world, a=0.4, radius=None, topk=1.0):
    radius = world.clip if radius is None else radius

    def pulled(anchor):
        def direction(theta, batch):
            move = theta - anchor
            outside = np.sqrt(np.sum(move**2)) > radius
            return world.grad(theta, batch) + (a * move if outside else 0.0)

        return direction

    return _averaged(world, pulled, lambda world, delta: world.largest(delta, topk))


def fed_smp(world, masks, p=0.4, scale=False):
    """``masks[t]`` coordinates of round t."""
    theta, thetas = world.problem.start, []
    for t, cohort in enumerate(world.cohorts):
        mask = masks[t]
        moves = [(world.local(theta, i, t, world.grad) - theta)[mask] / (p if scale else 1.0) for i in cohort]
        theta = theta.copy()
        theta[mask] += world.release(t, moves, len(mask))
        thetas.append(theta)
    return Result(thetas, {}, {})


def dp_fedpgn(world, gamma=0.2, r=0.0, smoothing=0.0):
    theta, c, thetas = world.problem.start, world.zeros, []
    for t, cohort in enumerate(world.cohorts):
        length = np.sqrt(np.sum(c**2))
        ascent = r * c / length if length else world.zeros

        def direction(x, batch, c=c, ascent=ascent):
            g = world.softmax.clipped(world.loss_grad(x + ascent, batch), world.step_clip)
            return gamma * g + (1 - gamma) * c + world.wd * x

        public = (1 - gamma) * world.steps * world.rate(t) * c
        residuals = [theta - world.local(theta, i, t, direction) - public for i in cohort]
        step = world.smoothed(world.release(t, residuals, len(theta)), smoothing) + public
        theta = theta - step
        c = step / (world.steps * world.rate(t))
        thetas.append(theta)
    return Result(thetas, {"c": c}, {})


def _momentum(world, beta, gradient):
    theta, c, thetas = world.problem.start, world.zeros, []
    for t, cohort in enumerate(world.cohorts):
        moves = [
            world.local(theta, i, t, lambda x, b, c=c: beta * gradient(x, b) + (1 - beta) * c) - theta for i in cohort
        ]
        move = world.release(t, moves, len(theta))
        theta = theta + move
        c = -move / (world.steps * world.rate(t))
        thetas.append(theta)
    return Result(thetas, {"momentum": c}, {})


def dp_fedcm(world, beta=0.1):
    return _momentum(world, beta, world.grad)


def dp_mofedsam(world, r=0.1, beta=0.1):
    return _momentum(world, beta, lambda x, b: world.sam(x, b, r))


def dp_scaffold(world, k=1.0):
    theta, c, own, thetas = world.problem.start, world.zeros, {}, []
    size = len(theta)
    for t, cohort in enumerate(world.cohorts):
        factor = k * world.steps * world.rate(t)
        uploads = []
        for i in cohort:
            mine = own.get(i, world.zeros)
            end = world.local(theta, i, t, lambda x, b, c=c, mine=mine: world.grad(x, b) - mine + c)
            fresh = mine - c + (theta - end) / (world.steps * world.rate(t))
            uploads.append(np.concatenate([end - theta, factor * (fresh - mine)]))
            own[i] = fresh
        release = world.release(t, uploads, 2 * size)
        theta = theta + release[:size]
        c = c + world.expected / world.problem.clients / factor * release[size:]
        thetas.append(theta)
    return Result(thetas, {"c": c}, {i: {"c": kept} for i, kept in own.items()})
