"""Local Adam and its federated forms in float64 NumPy, one element at a time where blocks are concerned.

Nothing here imports the package under test or torch. ``METHODS[name](world, **options)`` returns the parameters after
each round and the final server and client states.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class World:
    """Everything but the method: problem, cohorts, rates. ``softmax`` is the module of that name."""

    softmax: Any
    problem: Any
    cohorts: list
    lr: float = 0.01
    round_lr: str = "cosine"
    lr_decay: float = 0.998
    weight_decay: float = 0.01
    clip_grad: float = 10.0
    max_steps: int = 0
    weighting: str = "uniform"
    scale: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    no_decay_1d: bool = False
    states: dict = field(default_factory=dict)

    def rate(self, r):
        if self.round_lr == "exp":
            return self.lr * self.lr_decay ** (r + 1)
        return self.lr * (1 + math.cos(math.pi * r / len(self.cohorts))) / 2 if self.round_lr == "cosine" else self.lr

    def batches(self, client):
        return self.softmax.batches(self.problem, client, max_steps=self.max_steps)

    def gradient(self, theta, batch):
        raw = self.softmax.gradient(theta, *batch, self.problem.classes, self.scale)
        return self.softmax.clipped(raw, self.clip_grad)

    def lam(self):
        """Decay of each element; the bias is the only 1-D tensor."""
        lam = np.full(self.problem.start.size, self.weight_decay)
        if self.no_decay_1d:
            lam[-self.problem.classes :] = 0.0
        return lam

    def block_ids(self, rule):
        """Weight (C, d): a block per row, or one; bias: one block."""
        classes, size = self.problem.classes, self.problem.start.size
        dim = size // classes - 1
        ids = []
        for j in range(size):
            if rule == "full":
                ids.append(j)
            elif rule == "tensor":
                ids.append(0 if j < classes * dim else 1)
            else:
                ids.append(j // dim if j < classes * dim else classes)
        return ids

    def rounds(self, client_round, server_round, server):
        """Run ``client_round(theta, server, lr, client) -> upload`` on every cohort, then ``server_round``."""
        theta, found = self.problem.start.copy(), []
        for r, cohort in enumerate(self.cohorts):
            lr = self.rate(r)
            uploads = [client_round(theta, server, lr, client) for client in cohort]
            shares = self.softmax.weights(self.problem, cohort, self.weighting)
            mean = {name: self.softmax.average([u[name] for u in uploads], shares) for name in uploads[0]}
            steps = [len(self.batches(client)) for client in cohort]
            server = server_round(dict(server), mean, lr, sum(steps) / len(steps), max(steps), len(cohort))
            theta = theta + mean["delta"]
            found.append(theta.copy())
        return found, server, self.states


def block_means(values, ids):
    """Each element replaced by the mean of its block."""
    groups = {}
    for j, block in enumerate(ids):
        groups.setdefault(block, []).append(values[j])
    return np.array([math.fsum(groups[block]) / len(groups[block]) for block in ids])


def zeros(world):
    return np.zeros(world.problem.start.size)


def plain(server, mean, lr, mean_k, max_k, s):
    return server


def local_adamw(world):
    def client(theta, server, lr, i):
        x, m, v = theta.copy(), zeros(world), zeros(world)
        for k, batch in enumerate(world.batches(i), start=1):
            g = world.gradient(x, batch)
            m = world.b1 * m + (1 - world.b1) * g
            v = world.b2 * v + (1 - world.b2) * g**2
            mhat, vhat = m / (1 - world.b1**k), v / (1 - world.b2**k)
            x = x - lr * world.lam() * x - lr * mhat / (np.sqrt(vhat) + world.eps)
        return {"delta": x - theta}

    return world.rounds(client, plain, {})


def local_adam(world):
    def client(theta, server, lr, i):
        x, m, v = theta.copy(), zeros(world), zeros(world)
        for k, batch in enumerate(world.batches(i), start=1):
            g = world.gradient(x, batch) + world.lam() * x
            m = world.b1 * m + (1 - world.b1) * g
            v = world.b2 * v + (1 - world.b2) * g**2
            x = x - lr * (m / (1 - world.b1**k)) / (np.sqrt(v / (1 - world.b2**k)) + world.eps)
        return {"delta": x - theta}

    return world.rounds(client, plain, {})


def fedadamw(world, alpha=0.5, v_blocks="hessian", mix=False, bias="local"):
    ids = None if v_blocks == "none" else world.block_ids(v_blocks)

    def client(theta, server, lr, i):
        x, m, v, t = theta.copy(), zeros(world), server["v"].copy(), server["t"]
        for k, batch in enumerate(world.batches(i), start=1):
            t += 1
            g = world.gradient(x, batch)
            m = world.b1 * m + (1 - world.b1) * g
            v = world.b2 * v + (1 - world.b2) * g**2
            mhat = m / (1 - world.b1 ** (t if bias == "code" else k))
            vhat = v / (1 - world.b2 ** (k if ids is None else t))
            adam = mhat / (np.sqrt(vhat) + world.eps)
            x = (1 - lr * world.lam()) * x - lr * ((1 - alpha if mix else 1) * adam + alpha * server["direction"])
        return {"delta": x - theta, "v": zeros(world) if ids is None else block_means(v, ids)}

    def server_round(server, mean, lr, mean_k, max_k, s):
        return {"v": mean["v"], "direction": -mean["delta"] / (mean_k * lr), "t": server["t"] + max_k}

    return world.rounds(client, server_round, {"v": zeros(world), "direction": zeros(world), "t": 0})


def aggregated(world, carried, cap=None):
    def client(theta, server, lr, i):
        x, t = theta.copy(), server["t"]
        m = server["m"].copy() if "m" in carried else zeros(world)
        v = server["v"].copy() if "v" in carried else zeros(world)
        for k, batch in enumerate(world.batches(i), start=1):
            t += 1
            g = world.gradient(x, batch)
            m = world.b1 * m + (1 - world.b1) * g
            v = world.b2 * v + (1 - world.b2) * g**2
            mhat = m / (1 - world.b1 ** (t if "m" in carried else k))
            vhat = v / (1 - world.b2 ** (t if "v" in carried else k))
            adam = mhat / (np.sqrt(vhat) + world.eps)
            if cap is not None:
                adam = np.array([max(-cap, min(cap, a)) for a in adam])
            x = (1 - lr * world.lam()) * x - lr * adam
        return {"delta": x - theta, "m": m, "v": v}

    def server_round(server, mean, lr, mean_k, max_k, s):
        return {"m": mean["m"], "v": mean["v"], "t": server["t"] + max_k}

    return world.rounds(client, server_round, {"m": zeros(world), "v": zeros(world), "t": 0})


def agg_v(world):
    return aggregated(world, "v")


def agg_vm(world):
    return aggregated(world, "vm")


def agg_m(world, cap=1.0):
    return aggregated(world, "m", cap)


def fedlada(world, gamma=0.9):
    def client(theta, server, lr, i):
        x, m, v = theta.copy(), zeros(world), server["v"].copy()
        for batch in world.batches(i):
            g = world.gradient(x, batch) + world.lam() * x
            m = world.b1 * m + (1 - world.b1) * g
            v = world.b2 * v + (1 - world.b2) * g**2
            x = x - lr * ((1 - gamma) * m / (np.sqrt(v) + world.eps) + gamma * server["direction"])
        return {"delta": x - theta, "v": v}

    def server_round(server, mean, lr, mean_k, max_k, s):
        return {"v": mean["v"], "direction": -mean["delta"] / (mean_k * lr)}

    return world.rounds(client, server_round, {"v": zeros(world), "direction": zeros(world)})


def fedcm_adamw(world, beta=0.1):
    def client(theta, server, lr, i):
        x, m, v = theta.copy(), zeros(world), zeros(world)
        for k, batch in enumerate(world.batches(i), start=1):
            g = beta * world.gradient(x, batch) + (1 - beta) * server["direction"]
            m = world.b1 * m + (1 - world.b1) * g
            v = world.b2 * v + (1 - world.b2) * g**2
            mhat, vhat = m / (1 - world.b1**k), v / (1 - world.b2**k)
            x = (1 - lr * world.lam()) * x - lr * mhat / (np.sqrt(vhat) + world.eps)
        return {"delta": x - theta}

    def server_round(server, mean, lr, mean_k, max_k, s):
        return {"direction": -mean["delta"] / (mean_k * lr)}

    return world.rounds(client, server_round, {"direction": zeros(world)})


def scaffold_adamw(world):
    def client(theta, server, lr, i):
        x, m, v = theta.copy(), zeros(world), zeros(world)
        own, met = world.states.get(i, zeros(world)), []
        for k, batch in enumerate(world.batches(i), start=1):
            met.append(world.gradient(x, batch))
            g = met[-1] - own + server["c"]
            m = world.b1 * m + (1 - world.b1) * g
            v = world.b2 * v + (1 - world.b2) * g**2
            mhat, vhat = m / (1 - world.b1**k), v / (1 - world.b2**k)
            x = (1 - lr * world.lam()) * x - lr * mhat / (np.sqrt(vhat) + world.eps)
        fresh = np.mean(met, axis=0)
        world.states[i] = fresh
        return {"delta": x - theta, "variate": fresh - own}

    def server_round(server, mean, lr, mean_k, max_k, s):
        return {"c": server["c"] + s / world.problem.clients * mean["variate"]}

    return world.rounds(client, server_round, {"c": zeros(world)})


METHODS = {
    "local_adamw": local_adamw,
    "local_adam": local_adam,
    "fedadamw": fedadamw,
    "agg_v": agg_v,
    "agg_m": agg_m,
    "agg_vm": agg_vm,
    "fedlada": fedlada,
    "fedcm_adamw": fedcm_adamw,
    "scaffold_adamw": scaffold_adamw,
}
