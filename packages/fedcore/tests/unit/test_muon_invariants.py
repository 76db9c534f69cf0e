"""What FedMuon is in its limits, how its parts relate, and what reaches the wire."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedcore import Simulation
from fedcore.algorithm import Client, Context, Local, Step
from fedcore.algorithms import create, fedmuon
from fedcore.algorithms.fedmuon import FedMuon
from fedcore.ops import matrices
from fedcore.spec import ParamSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from torch import nn
from torch.utils.data import TensorDataset

WORDS = {"fedmuon", "local_muon"}


def network(bias=True):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias)).double()


def clients(sizes=(8, 8, 8), seed=0):
    draw = torch.Generator().manual_seed(seed)
    pairs = [(n, torch.randn(n, 6, generator=draw, dtype=torch.float64)) for n in sizes]
    return [TensorDataset(x + 0.5 * i, torch.randint(3, (n,), generator=draw)) for i, (n, x) in enumerate(pairs)]


def simulate(algorithm, *, model=None, data=None, rounds=4, cohorts=None, **options):
    algorithm = create(algorithm) if isinstance(algorithm, str) else algorithm
    data = data or clients()
    shape = {"batch_size": 4, "local_epochs": 2, "shuffle": False, "engine": "serial", "rounds": rounds, **options}
    return Simulation(model or network(), data, algorithm, cohorts=cohorts or [range(len(data))] * rounds, **shape)


def flats(sim, rounds=4):
    found = []
    for _ in range(rounds):
        sim.round()
        found.append(sim.flat.clone())
    return found


@pytest.fixture(params=[matrices.FEW, 0], ids=["few spans", "bridged"])
def spans(request, monkeypatch):
    """Tensor by tensor, and as for models of many tensors: momentum in long segments with gaps, class A gathered."""
    for module in (matrices, fedmuon):
        monkeypatch.setattr(module, "FEW", request.param)
    monkeypatch.setattr(matrices, "SWALLOWED", 1.0)
    matrices._layout.cache_clear()
    yield
    matrices._layout.cache_clear()


class Fixed:
    """Gradients by step, for one client (P,) or several (clients, P)."""

    def __init__(self, grads, missing=()):
        self.grads, self.missing = grads, missing

    def __call__(self, params, batch, *, rng, update_buffers=True):
        return self.grads[batch].clone(), params.new_zeros(params.shape[:-1])


def context(lr=0.01, steps=3, round=1):
    return Context(round, 10, 3, 3, lr, lr, steps, steps)


def drive(algorithm, params, server, grads, *, lr=0.01, missing=()):
    """Local training on given gradients (K, ..., P); returns what ``local_finish`` gives and the last ``own``."""
    ctx = context(lr, len(grads))
    _, message = algorithm.broadcast(server, params, ctx, Client(0, 10, len(grads)))
    start, local = algorithm.local_init(params, message, {}, ctx, lambda p: p)
    moving = start.expand(grads.shape[1:]).clone()
    for k in range(len(grads)):
        step = Step(k, len(grads), 1, lr, lr, 0)
        moving, local = algorithm.local_step(moving, Fixed(grads, missing), k, local, step)
    upload, state = algorithm.local_finish(start, moving, message, {}, local, ctx)
    assert state == {}
    return upload, local.own


def world(seed=0, lead=(), steps=3):
    """A bound layout, parameters, a server state that is not zero, and gradients."""
    draw = torch.Generator().manual_seed(seed)
    spec = ParamSpec.from_module(network())
    size = spec.numel

    def vector(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    server = {"momentum": vector(45), "direction": vector(size)}
    return spec, vector(size), server, vector(steps, *lead, size)


# ---------------------------------------------------------------------- limits


def test_without_gamma_and_aggregation_it_is_local_muon():
    other = create("fedmuon", gamma=0.0, aggregate_momentum=False, beta=0.95, lr=0.01)
    for first, second in zip(flats(simulate(other)), flats(simulate(create("local_muon", lr=0.01))), strict=True):
        assert torch.equal(first, second)


def test_switched_on_local_muon_is_fedmuon():
    other = create("local_muon", gamma=0.5, beta=0.98, aggregate_momentum=True, align=True)
    assert all(map(torch.equal, flats(simulate(other)), flats(simulate("fedmuon"))))


@pytest.mark.parametrize("gamma", [0.25, 0.5, 0.9])
def test_round_0_is_local_muon_at_a_smaller_rate(gamma):
    strong = {"lr": 0.02, "beta": 0.98, "weight_decay": 0.3}
    (first,) = flats(simulate(create("fedmuon", gamma=gamma, **strong)), 1)
    (second,) = flats(simulate(create("local_muon", **{**strong, "lr": 0.02 * (1 - gamma)})), 1)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_the_switch_of_alignment_is_gamma_0():
    first, second = simulate(create("fedmuon", align=False)), simulate(create("fedmuon", gamma=0.0))
    assert all(map(torch.equal, flats(first), flats(second)))
    assert set(first.server_state) == set(second.server_state) == {"momentum"}


def test_momentum_goes_on_over_rounds():
    # No biases: class A starts anew in every round. One client that takes all its data in every round.
    options = {"gamma": 0.0, "round_lr": "constant", "lr": 0.02}
    data = clients((8,))
    short = simulate(create("fedmuon", **options), model=network(False), data=data, local_epochs=1)
    long = simulate(create("fedmuon", **options), model=network(False), data=data, local_epochs=4, rounds=1)
    *_, last = flats(short)
    torch.testing.assert_close(last, flats(long, 1)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(short.server_state["momentum"], long.server_state["momentum"], rtol=0, atol=1e-12)
    without = simulate(create("fedmuon", **options, aggregate_momentum=False), model=network(False), data=data)
    assert float((flats(without)[-1] - last).abs().max()) > 1e-3


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999), st.floats(1e-3, 1e3))
def test_momentum_as_a_sum_gives_the_same_direction(seed, factor):
    # M' = beta M' + g is M / (1 - beta): the direction knows no scale, so scaled gradients from zero move alike.
    spec, params, _, grads = world(seed)
    algorithm = create("fedmuon", align=False, clip_grad=0.0, ns_eps=1e-30, adam_eps=1e-30, weight_decay=0.0).bind(spec)
    server = algorithm.server_init(params)
    first, second = (drive(algorithm, params, server, scale * grads)[0] for scale in (1.0, factor))
    torch.testing.assert_close(first["delta"], second["delta"], rtol=0, atol=1e-9)
    torch.testing.assert_close(factor * first["momentum"], second["momentum"], rtol=1e-9, atol=0)


# ---------------------------------------------------------------------- alignment


class Recording(FedMuon):
    """Takes every local step twice: on copies without the alignment, and really."""

    def local_step(self, params, grad_fn, batch, local, step):
        alone = Local({k: v for k, v in local.shared.items() if k != "direction"})
        alone.own.update({k: v.clone() for k, v in local.own.items()})
        after, _ = super().local_step(params.clone(), grad_fn, batch, alone, step)
        MOVES.append(after - params)
        return super().local_step(params, grad_fn, batch, local, step)


MOVES = []


@pytest.mark.parametrize("gamma", [0.3, 0.6])
def test_alignment_is_an_average_over_rounds(gamma):
    # Without decay: move_r = (1 - gamma) L_r + gamma eta_r / eta_(r-1) move_(r-1), L_r the moves without alignment.
    algorithm = Recording(gamma=gamma, lr=0.02, weight_decay=0.0)
    sim, last, rates = simulate(algorithm, rounds=5), None, []
    for r in range(5):
        MOVES.clear()
        before = sim.flat.clone()
        sim.round()
        move, rate = sim.flat - before, algorithm.rate(r, 5)
        alone = torch.stack(MOVES).sum(dim=0) / 3  # mean over clients, (1 - gamma) inside
        wanted = alone if last is None else alone + gamma * rate / rates[-1] * last
        torch.testing.assert_close(move, wanted, rtol=0, atol=1e-12)
        last = move
        rates.append(rate)
    assert rates[0] > 1.2 * rates[-1]


def test_half_the_rate_halves_the_alignment_exactly():
    spec, params, server, _ = world(3)
    algorithm = create("fedmuon", clip_grad=0.0, weight_decay=0.0, aggregate_momentum=False).bind(spec)
    none = torch.zeros(1, spec.numel, dtype=torch.float64)  # no gradient, no momentum: the alignment is all there is
    at = torch.zeros_like(params)
    server = {"direction": server["direction"]}
    full, half = (drive(algorithm, at, server, none, lr=lr)[0]["delta"] for lr in (0.02, 0.01))
    assert torch.equal(half, full / 2)
    torch.testing.assert_close(full, -0.5 * 0.02 * server["direction"], rtol=1e-15, atol=0)


def test_the_divisor_is_the_base_rate_and_the_mean_of_steps():
    spec, params, server, _ = world(4)
    algorithm = create("fedmuon", mu_lr=7.0).bind(spec)
    delta = torch.randn(spec.numel, dtype=torch.float64)
    reduced = {"delta": delta, "momentum": server["momentum"]}
    after, state = algorithm.server_step(server, params, reduced, context(0.02, 3.5))
    assert torch.equal(after, params + delta)
    torch.testing.assert_close(state["direction"], -delta / (3.5 * 0.02), rtol=1e-14, atol=0)
    assert torch.equal(state["momentum"], server["momentum"])


# ---------------------------------------------------------------------- many clients together, missing gradients


@pytest.mark.parametrize(
    "options",
    [{}, {"orth": "svd"}, {"nesterov": False}, {"momentum_rank_ratio": 0.7}, {"align": False}, {"ns_form": "standard"}],
    ids=str,
)
@pytest.mark.parametrize("aggregate", [True, False])
def test_clients_together_are_clients_one_by_one(options, aggregate, spans):
    spec, params, server, grads = world(5, (4,))
    algorithm = create("fedmuon", aggregate_momentum=aggregate, clip_grad=3.0, **options).bind(spec)
    server = {name: server[name] for name in algorithm.server_init(params)}
    kept = {name: value.clone() for name, value in server.items()}
    together, _ = drive(algorithm, params, server, grads)
    decoded = algorithm.decode(together)
    for i in range(4):
        alone, _ = drive(algorithm, params, server, grads[:, i])
        assert set(alone) == set(together)
        for name, value in algorithm.decode(alone).items():
            torch.testing.assert_close(decoded[name][i], value, rtol=1e-12, atol=1e-13)
    assert all(torch.equal(server[name], kept[name]) for name in kept)


@pytest.mark.parametrize("aggregate", [True, False])
@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_tensors_without_gradient_keep_their_momentum_and_only_align(name, lead, aggregate, spans):
    spec, params, server, grads = world(6, lead)
    algorithm = create("fedmuon", weight_decay=0.5, clip_grad=0.0, aggregate_momentum=aggregate).bind(spec)
    server = {key: server[key] for key in algorithm.server_init(params)}
    item = spec.info(name)
    grads[..., item.start : item.stop] = 0.0
    upload, _ = drive(algorithm, params, server, grads, missing=((item.start, item.stop),))
    wanted = -0.5 * 0.01 * len(grads) * server["direction"][item.start : item.stop]
    found = upload["delta"][..., item.start : item.stop]
    torch.testing.assert_close(found, wanted.expand(found.shape), rtol=0, atol=1e-14)
    whole, _ = drive(algorithm, params, server, grads)
    others = torch.ones(spec.numel, dtype=torch.bool)
    others[item.start : item.stop] = False
    assert torch.equal(upload["delta"][..., others], whole["delta"][..., others])
    if aggregate and "weight" in name:
        at = 0 if name == "0.weight" else 30
        part = slice(at, at + item.numel)
        assert torch.equal(upload["momentum"][..., part], server["momentum"][part].expand(*lead, -1))
        assert not torch.equal(whole["momentum"][..., part], server["momentum"][part].expand(*lead, -1))


def test_branch_that_is_never_used_keeps_its_place_and_momentum():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 3).double(), nn.Linear(6, 3).double()

        def forward(self, x):
            return self.used(x)

    model = Half()
    before = model.unused.weight.detach().clone()
    sim = simulate(create("fedmuon", lr=0.05, weight_decay=0.5), model=model)
    flats(sim)
    assert torch.equal(sim.params["unused.weight"], before)
    assert not sim.server_state["momentum"][18:].any()
    assert sim.server_state["momentum"][:18].all()


# ---------------------------------------------------------------------- the wire


def test_bytes_and_no_state_on_clients():
    size, matrices = 53, 45
    for options, up, down in [
        ({}, size + matrices, 2 * size + matrices),
        ({"gamma": 0.0}, size + matrices, size + matrices),
        ({"aggregate_momentum": False}, size, 2 * size),
        ({"gamma": 0.0, "aggregate_momentum": False}, size, size),
        # Ranks: floor(.7 * 30 / 12) = 1 and floor(.7 * 15 / 9) = 1; factors of 12 and 9 numbers.
        ({"momentum_rank_ratio": 0.7}, size + 12 + 9, 2 * size + matrices),
    ]:
        sim = simulate(create("fedmuon", **options), rounds=1)
        row = sim.round()
        assert (row["comm/up_bytes"], row["comm/down_bytes"]) == (3 * 8 * up, 3 * 8 * down)
        assert not sim.client_states


def test_large_rank_ratio_is_no_compression():
    plain, packed = simulate("fedmuon"), simulate(create("fedmuon", momentum_rank_ratio=1.0))
    assert all(map(torch.equal, flats(plain), flats(packed)))
    small = simulate(create("fedmuon", momentum_rank_ratio=0.5))
    assert not torch.equal(flats(small)[-1], plain.flat)


def test_momentum_of_low_rank_survives_compression():
    # A single sample a batch and no hidden layer: every gradient has rank 1, and one step is taken.
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    data = clients((1,))
    found = [
        simulate(create("fedmuon", momentum_rank_ratio=q), model=model, data=data, rounds=1, local_epochs=1)
        for q in (0.0, 0.6)
    ]
    for sim in found:
        sim.round()
    first, second = (sim.server_state["momentum"] for sim in found)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-14)


# ---------------------------------------------------------------------- against torch's own


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_one_step_of_torchs_muon(shape, nesterov):
    Muon = getattr(torch.optim, "Muon", None)
    if Muon is None:
        pytest.skip("needs torch.optim.Muon (2.9)")
    torch.manual_seed(0)
    weight, grad, old = (torch.randn(shape) for _ in range(3))
    parameter = nn.Parameter(weight.clone())
    optimizer = Muon([parameter], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov)
    parameter.grad = grad.clone()
    optimizer.state[parameter]["momentum_buffer"] = old.clone()
    optimizer.step()
    spec = ParamSpec.from_module(nn.ParameterDict({"w": parameter}))
    algorithm = create(
        "fedmuon", gamma=0.0, beta=0.95, mu_lr=1.0, weight_decay=0.1, clip_grad=0.0, nesterov=nesterov
    ).bind(spec)
    upload, _ = drive(algorithm, weight.flatten(), {"momentum": old.flatten()}, grad.flatten()[None], lr=0.02)
    buffer = optimizer.state[parameter]["momentum_buffer"]
    torch.testing.assert_close(upload["momentum"], buffer.flatten(), rtol=1e-6, atol=1e-6)
    scale = 0.02 * math.sqrt(max(1.0, shape[0] / shape[1]))
    decayed = weight * (1 - 0.02 * 0.1)
    theirs = (decayed - parameter.detach()) / scale
    ours = (decayed - weight - upload["delta"].view(shape)) / scale
    assert float((ours - theirs).norm() / theirs.norm()) < 0.1  # theirs iterates in bfloat16
    assert float(torch.linalg.svdvals(ours).max()) < 1.21
    assert float(torch.linalg.svdvals(theirs).max()) < 1.21


@pytest.mark.parametrize("orth", ["quintic", "polar_express", "svd"])
def test_momentum_is_not_normalised_in_place(orth, spans):
    # Without Nesterov the direction is the momentum itself; dividing it in place would overwrite it.
    spec, params, server, grads = world(7, steps=1)
    algorithm = create("fedmuon", nesterov=False, orth=orth, clip_grad=0.0).bind(spec)
    upload, _ = drive(algorithm, params, server, grads)
    flat = torch.cat([grads[0, :30], grads[0, 35:50]])
    torch.testing.assert_close(upload["momentum"], 0.98 * server["momentum"] + 0.02 * flat, rtol=0, atol=1e-14)


def test_one_step_of_class_a_is_torchs_adamw():
    spec, params, server, grads = world(8, steps=4)
    algorithm = create("fedmuon", clip_grad=0.0, gamma=0.0, weight_decay=0.2).bind(spec)
    upload, _ = drive(algorithm, params, {"momentum": server["momentum"]}, grads, lr=0.03)
    for item in spec:
        if len(item.shape) > 1:
            continue
        parameter = nn.Parameter(item.view(params).clone())
        optimizer = torch.optim.AdamW([parameter], lr=0.03, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.2)
        for grad in grads:
            parameter.grad = item.view(grad).clone()
            optimizer.step()
        moved = parameter.detach() - item.view(params)
        torch.testing.assert_close(item.view(upload["delta"]), moved, rtol=0, atol=1e-13)


# ---------------------------------------------------------------------- options


def test_defaults_are_the_specifications():
    chosen, local_muon = create("fedmuon"), create("local_muon")
    assert (chosen.gamma, chosen.beta, chosen.lr, chosen.mu_lr) == (0.5, 0.98, 3e-4, 10.0)
    assert (chosen.weight_decay, chosen.round_lr, chosen.clip_grad) == (0.01, "cosine", 10.0)
    assert (chosen.orth, chosen.ns_steps, chosen.ns_eps, chosen.nesterov) == ("quintic", 5, 1e-7, True)
    assert (chosen.adam_beta1, chosen.adam_beta2, chosen.adam_eps) == (0.9, 0.95, 1e-10)
    assert (local_muon.gamma, local_muon.beta, local_muon.aggregate_momentum) == (0.0, 0.95, False)


def test_preset_of_the_paper():
    paper = create("fedmuon", variant="paper", lr=0.1)
    assert (paper.nesterov, paper.orth, paper.mu_lr, paper.conv_scale) == (False, "svd", 1.0, "none")
    assert replace(paper, lr=0.2).orth == "svd"
    with pytest.raises(UserError, match=r"mu_lr=5.0; expected 1.0 under variant=paper"):
        create("fedmuon", variant="paper", mu_lr=5.0)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gamma", 1.0),
        ("gamma", -0.1),
        ("beta", 1.0),
        ("mu_lr", 0.0),
        ("ns_steps", 0),
        ("ns_eps", 0.0),
        ("momentum_rank_ratio", -1.0),
        ("adam_eps", 0.0),
        ("orth", "cubic"),
        ("ns_dtype", "half"),
        ("ns_form", "best"),
        ("muon_params", "some"),
        ("conv_scale", "kernel"),
        ("variant", "thesis"),
        ("gamma", math.nan),
    ],
)
@pytest.mark.parametrize("name", sorted(WORDS))
def test_options_out_of_range(name, option, value):
    with pytest.raises(UserError, match=f"{option}="):
        create(name, **{option: value})


@pytest.mark.parametrize("model", [nn.Linear(6, 3, bias=False), nn.Sequential(nn.LayerNorm(6), nn.Flatten())], ids=str)
@pytest.mark.parametrize("name", sorted(WORDS))
def test_models_of_one_class_only(name, model):
    data = [TensorDataset(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(2)]
    sim = Simulation(model, data, create(name, lr=0.01), batch_size=2, cohorts=[[0, 1]] * 2, rounds=2, engine="serial")
    start = sim.flat.clone()
    sim.run(rounds=2)
    assert not torch.equal(sim.flat, start)
    assert np.isfinite(sim.flat.numpy()).all()
