"""Drives the functions of an algorithm by hand on quadratic losses whose gradients are recorded."""

from dataclasses import replace

import torch
from fedcore.algorithm import Client, Context, Step
from fedcore.spec import ParamSpec
from torch import nn


class Recorder:
    """A ``GradFn``: batch k of client i has the gradient ``curvature_i (theta - centre_ik)``.

    ``met`` collects what was handed out. ``missing`` are spans without gradient. ``which`` is a client, or
    ``slice(None)`` for all together.
    """

    def __init__(self, seed=0, clients=3, steps=8, dtype=torch.float64, module=None):
        draw = torch.Generator().manual_seed(seed)
        self.spec = ParamSpec.from_module((nn.Linear(4, 3) if module is None else module).to(dtype))
        size = self.spec.numel
        self.curvature = 0.2 + torch.rand(clients, size, generator=draw, dtype=torch.float64).to(dtype)
        self.centres = 2 * torch.randn(clients, steps, size, generator=draw, dtype=torch.float64).to(dtype)
        self.params = torch.randn(size, generator=draw, dtype=torch.float64).to(dtype)
        self.clients, self.which, self.missing, self.met = clients, 0, (), []

    def __call__(self, params, batch, *, rng, update_buffers=True):
        grad = self.curvature[self.which] * (params - self.centres[self.which, batch])
        for start, stop in self.missing:
            grad[..., start:stop] = 0.0
        self.met.append(grad.clone())
        return grad, params.new_zeros(())


def context(steps, lr=0.1, last_lr=None, round=0, cohort=3, num_clients=10):
    """``steps``: K, or (clients, 1)."""
    most = int(steps.max()) if isinstance(steps, torch.Tensor) else steps
    return Context(round, 10, num_clients, cohort, lr, lr if last_lr is None else last_lr, steps, most)


def train(algorithm, grad_fn, params, server, steps, state=None, lr=0.1):
    """Local training of ``grad_fn.which``; clients that are done are held still. Returns upload, state and end."""
    ctx = context(steps, lr)
    client = Client(grad_fn.which, 10, steps)
    together = isinstance(grad_fn.which, slice)
    state = algorithm.client_init(ctx, client) if state is None else state
    if together:
        state = {name: value.expand(grad_fn.clients, -1) for name, value in state.items()}
    received, message = algorithm.broadcast(server, params, ctx, client)
    start, local = algorithm.local_init(received, message, state, ctx, lambda p: p)
    now = start.expand(grad_fn.clients, -1).clone() if together else start.clone()
    for k in range(ctx.max_steps):
        before, own = now.clone(), {name: value.clone() for name, value in local.own.items()}
        now, local = algorithm.local_step(now, grad_fn, k, local, Step(k, steps, 0, lr, lr, 0))
        if together and k:
            now = torch.where(k < steps, now, before)
            local.own.update({name: torch.where(k < steps, local.own[name], own[name]) for name in own})
    upload, state = algorithm.local_finish(start, now, message, state, local, ctx)
    return upload, state, now


def rounds(algorithm, grad_fn, lrs, steps, cohort=(0,)):
    """Whole rounds by hand, one for each rate; ``steps[i]`` is K of the i-th client of the cohort.

    Yields parameters before, mean upload, parameters after, server state after.
    """
    algorithm = algorithm.bind(grad_fn.spec)
    params, server, states = grad_fn.params, algorithm.server_init(grad_fn.params), {}
    for lr in lrs:
        uploads = []
        for client, k in zip(cohort, steps, strict=True):
            grad_fn.which = client
            upload, states[client], _ = train(algorithm, grad_fn, params, server, k, states.get(client), lr)
            uploads.append(upload)
        mean = {name: torch.stack([u[name] for u in uploads]).mean(dim=0) for name in uploads[0]}
        ctx = context(max(steps), lr, cohort=len(cohort), num_clients=grad_fn.clients)
        before = params
        params, server = algorithm.server_step(server, params, mean, replace(ctx, steps=sum(steps) / len(steps)))
        yield before, mean, params, server
