"""Drives the functions of an algorithm by hand, for one client or for many together, on quadratic losses."""

import torch
from fedcore.algorithm import Client, Context, Step
from fedcore.spec import ParamSpec
from torch import nn


class Quadratics:
    """Batch k of client i has the gradient ``curvature_i * (theta - centre_ik)``.

    ``clients`` clients with ``steps`` batches each over P = 15 parameters; ``gradients`` collects what was handed out.
    """

    def __init__(self, seed, clients=3, steps=7, dtype=torch.float64):
        draw = torch.Generator().manual_seed(seed)
        self.spec = ParamSpec.from_module(nn.Linear(4, 3).to(dtype))
        size = self.spec.numel
        self.curvature = 0.2 + torch.rand(clients, size, generator=draw, dtype=dtype)
        self.centres = 2 * torch.randn(clients, steps, size, generator=draw, dtype=dtype)
        self.params = torch.randn(size, generator=draw, dtype=dtype)
        self.draw, self.clients, self.dtype = draw, clients, dtype

    def vector(self, *lead):
        """Random numbers (..., P)."""
        return torch.randn(*lead, self.spec.numel, generator=self.draw, dtype=self.dtype)

    def gradient(self, which, params, k):
        return self.curvature[which] * (params - self.centres[which, k])

    def full_gradient(self, which, params):
        return self.curvature[which] * (params - self.centres[which].mean(dim=-2))


def context(steps, *, lr=0.1, round=0, rounds=10, num_clients=10, cohort=3):
    most = int(steps.max()) if isinstance(steps, torch.Tensor) else steps
    return Context(round, rounds, num_clients, cohort, lr, lr, steps, most)


def train(algorithm, world, which, server, state, steps, **numbers):
    """Local training of client ``which`` (an index), or of all together (``slice(None)``, ``steps`` (clients, 1)).

    Returns:
        Upload, new state, and the pairs (parameters, loss gradient) met.
    """
    ctx = context(steps, **numbers)
    received, message = algorithm.broadcast(server, world.params, ctx, Client(which, 10, steps))
    start, local = algorithm.local_init(
        received, message, state, ctx, lambda params: world.full_gradient(which, params)
    )
    together = isinstance(which, slice)
    params = start.expand(world.clients, -1).clone() if together else start.clone()
    met = []

    def grad_fn(params, batch, *, rng, update_buffers=True):
        grad = world.gradient(which, params, batch)
        met.append((params.clone(), grad.clone()))
        return grad, params.new_zeros(())

    for k in range(ctx.max_steps):
        before = params.clone()
        params, local = algorithm.local_step(params, grad_fn, k, local, Step(k, steps, ctx.round, ctx.lr, ctx.lr, 0))
        if together:
            params = torch.where(k < steps, params, before)
    upload, state = algorithm.local_finish(start, params, message, state, local, ctx)
    return upload, state, met
