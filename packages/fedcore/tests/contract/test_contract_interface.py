"""The interface proved on two methods that are unlike the others: noise on sums, and uploads of unequal shapes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fedcore import Simulation
from fedcore.algorithm import Algorithm
from fedcore.algorithms import create
from fedcore.reduce import Reducer
from torch import nn
from torch.utils.data import TensorDataset


def regression(clients=4, samples=8, inputs=6, outputs=5):
    draw = torch.Generator().manual_seed(0)
    data = []
    for _ in range(clients):
        x = torch.randn(samples, inputs, generator=draw, dtype=torch.float64)
        data.append(TensorDataset(x, torch.randn(samples, outputs, generator=draw, dtype=torch.float64)))
    return data


# ------------------------------------------------------------------ client-level privacy


@dataclass(frozen=True, kw_only=True)
class PenalisedGradient(Algorithm):
    """DP-FedPGN without its accountant: g mixed with the private estimate c of the global gradient."""

    reduction = "sum"
    gamma: float = 0.2
    expected: float = 2.0

    def server_init(self, params):
        return {"c": torch.zeros_like(params)}

    def broadcast(self, server, params, ctx, client):
        return params, {"c": server["c"]}

    def local_init(self, params, message, state, ctx, full_grad):
        local = super().local_init(params, message, state, ctx, full_grad)[1]
        local.shared["c"] = message["c"]
        return params, local

    def local_step(self, params, grad_fn, batch, local, step):
        grad, _ = grad_fn(params, batch, rng=step.rng)
        move = self.gamma * grad + (1 - self.gamma) * local.shared["c"] + self.weight_decay * params
        return params.sub_(move, alpha=step.lr), local

    def local_finish(self, start, params, message, state, local, ctx):
        base = (1 - self.gamma) * ctx.steps * ctx.lr * message["c"]
        return {"residual": start - params - base}, state

    def server_step(self, server, params, reduced, ctx):
        base = (1 - self.gamma) * ctx.max_steps * ctx.lr * server["c"]
        step = reduced["residual"] / self.expected + base
        return params - step, {"c": step / (ctx.max_steps * ctx.lr)}


class Mechanism(Reducer):
    """Clips each upload as a whole and adds noise to the sum, once a round."""

    bound, noise = 0.05, 0.0

    def add(self, result):
        norm = torch.cat([v.reshape(-1) for v in result.upload.values()]).norm()
        result.upload = {k: v * min(1.0, self.bound / float(norm)) for k, v in result.upload.items()}
        super().add(result)

    def result(self):
        return {k: v + self.bound * self.noise * torch.randn_like(v) for k, v in super().result().items()}


class Private(Simulation):
    mechanism = Mechanism

    def make_reducer(self):
        return self.mechanism(self.algorithm.reduction, self.weighting)


def private(kind, algorithm, **options):
    torch.manual_seed(0)
    model = nn.Linear(6, 5).double()
    return kind(model, regression(), algorithm, loss=nn.functional.mse_loss, batch_size=4, local_epochs=2, **options)


def test_private_sum_without_clipping_is_fedcm_with_the_same_mixture():
    class Open(Mechanism):
        bound = float("inf")

        def result(self):
            return Reducer.result(self)

    kind = type("OpenRun", (Private,), {"mechanism": Open})
    ours = private(
        kind, PenalisedGradient(gamma=0.3, clip_grad=0.0, weight_decay=0.0), cohorts=[[0, 1], [1, 3], [0, 2]]
    )
    plain = private(
        Simulation, create("fedcm", beta=0.3, clip_grad=0.0, weight_decay=0.0), cohorts=[[0, 1], [1, 3], [0, 2]]
    )
    for _ in range(3):
        ours.round()
        plain.round()
        torch.testing.assert_close(ours.flat, plain.flat, rtol=1e-12, atol=1e-14)


def test_the_mechanism_bounds_what_one_client_can_do():
    start = private(Private, PenalisedGradient(clip_grad=0.0), cohorts=[[0, 1]])
    before = start.flat.clone()
    start.round()
    # The base term is zero in round 0: the move is the clipped sum over the expected cohort.
    assert float((start.flat - before).norm()) <= 2 * Mechanism.bound / 2.0 * (1 + 1e-9)


# ------------------------------------------------------------------ adapters of unequal rank


class Adapted(nn.Module):
    """A frozen linear layer plus B A, whose factors are the trainable parameters."""

    def __init__(self, rank, inputs=6, outputs=5):
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        weight = torch.randn(outputs, inputs, generator=draw, dtype=torch.float64)
        q, r = torch.linalg.qr(weight)
        self.lora_B = nn.Parameter(q[:, :rank].contiguous())
        self.lora_A = nn.Parameter(r[:rank].contiguous())
        self.base = nn.Parameter(weight - (self.lora_B @ self.lora_A).detach(), requires_grad=False)

    def forward(self, x):
        return x @ (self.base + self.lora_B @ self.lora_A).T


@dataclass(frozen=True, kw_only=True)
class ConcatQR(Algorithm):
    """ILoRA's aggregation: the exact weighted sum of products, factored again and truncated to each client's rank."""

    reduction = "list"

    def broadcast(self, server, params, ctx, client):
        own, mine = self.spec.unflatten(params), self.spec.ranks[client.rank]
        cut = {"lora_B": own["lora_B"][:, : client.rank], "lora_A": own["lora_A"][: client.rank]}
        return mine.flatten(cut), {}

    def local_finish(self, start, params, message, state, local, ctx):
        return {name: value.clone() for name, value in self.spec.unflatten(params).items()}, state

    def server_step(self, server, params, reduced, ctx):
        product = sum(weight * upload["lora_B"] @ upload["lora_A"] for _, weight, upload in reduced)
        q, r = torch.linalg.qr(product)
        rank = self.spec.info("lora_A").shape[0]
        sign = torch.sign(torch.diagonal(r))
        q, r = q * sign, r * sign[:, None]
        return self.spec.flatten({"lora_B": q[:, :rank], "lora_A": r[:rank]}), server


def adapted(cohorts, ranks=(2, 4, 5, 2)):
    return Simulation(
        Adapted,
        regression(),
        ConcatQR(lr=0.05, weight_decay=0.0, round_lr="constant"),
        loss=nn.functional.mse_loss,
        batch_size=4,
        ranks=ranks,
        cohorts=cohorts,
        engine="serial",
    )


def test_uploads_of_unequal_ranks_are_aggregated_exactly():
    sim = adapted([[0, 1, 2]])
    assert {r: s.numel for r, s in sim.algorithm.spec.ranks.items()} == {2: 22, 4: 44, 5: 55}
    sim.round()
    # Independently: each client takes two steps on its own factors, which start as a cut of the common ones.
    products = []
    for client, rank in ((0, 2), (1, 4), (2, 5)):
        net = Adapted(rank)
        base, b, a = (p.detach().numpy().copy() for p in (net.base, net.lora_B, net.lora_A))
        x, y = (t.numpy() for t in regression()[client].tensors)
        order = sim.federation.plan.batches(0, client, 8)
        for index in order:
            xs, ys = x[index.numpy()], y[index.numpy()]
            error = 2 * (xs @ (base + b @ a).T - ys) / ys.size
            grad_w = error.T @ xs
            grad_b, grad_a = grad_w @ a.T, b.T @ grad_w
            scale = min(1.0, 10.0 / np.sqrt((grad_b**2).sum() + (grad_a**2).sum()))
            b, a = b - 0.05 * scale * grad_b, a - 0.05 * scale * grad_a
        products.append(b @ a)
    found = sim.params["lora_B"] @ sim.params["lora_A"]
    np.testing.assert_allclose(found.numpy(), np.mean(products, axis=0), rtol=0, atol=1e-10)


def test_each_client_is_sent_what_its_rank_needs():
    sim = adapted([[0, 1, 2]])
    row = sim.round()
    assert row["comm/down_bytes"] == 8 * (22 + 44 + 55)
    assert row["comm/up_bytes"] == row["comm/down_bytes"]


def test_ranks_need_a_function_of_the_rank():
    from polymodal.errors import UserError

    with pytest.raises(UserError, match="function"):
        Simulation(nn.Linear(6, 5).double(), regression(), ConcatQR(), loss=nn.functional.mse_loss, ranks=[2] * 4)
