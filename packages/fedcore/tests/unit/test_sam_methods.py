"""How the sharpness-aware methods use gradients: hand cases, calls, client dimension, running statistics, options."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from fedcore import Simulation
from fedcore.algorithm import Client, Context, Local, Step
from fedcore.algorithms import create
from fedcore.spec import ParamInfo, ParamSpec
from polymodal.errors import UserError
from torch import nn
from torch.utils.data import TensorDataset

P, CLIENTS, STEPS = 5, 3, 4
STEP = Step(k=0, K=STEPS, round=1, lr=0.1, last_lr=0.1, rng=77)
METHODS = [
    ("fedsam", {}),
    ("fedasam", {}),
    ("mofedsam", {"beta": 0.4}),
    ("fedlesam", {"r": 0.3}),
    ("fedgamma", {}),
    ("fednsam", {"b": 0.2}),
    ("fedspeed", {"alpha": 0.6}),
    ("fedspeed", {"dual_mean": "cohort"}),
]


class Quadratic:
    """Gradient ``curvature * (x - centre)``, and a record of the calls."""

    missing = ()

    def __init__(self, curvature, centre=0.0):
        self.curvature, self.centre, self.calls = curvature, centre, []

    def __call__(self, params, batch, *, rng, update_buffers=True):
        self.calls.append((params.clone(), batch, rng, update_buffers))
        grad = self.curvature * (params - self.centre)
        return grad, 0.5 * (grad * (params - self.centre)).sum(-1)


def context(steps=STEPS):
    return Context(round=1, rounds=3, num_clients=8, cohort=CLIENTS, lr=0.1, last_lr=0.1, steps=steps, max_steps=STEPS)


def bound(name, **options):
    spec = ParamSpec((ParamInfo("w", (P,), 0, P, "vector"),), torch.float64)
    return create(name, **options).bind(spec)


def one(value):
    return torch.tensor([value], dtype=torch.float64)


# At x = 2 of x^2 / 2 with r = 0.5 the gradient is 2 + r; with decay 0.1 the step is 0.1 (2.5 + 0.2).
@pytest.mark.parametrize(
    ("name", "options", "local", "gradient"),
    [
        ("fedsam", {"r": 0.5}, Local(), 2.5),
        ("fedsam", {"r": 0.5, "clip_grad": 1.0}, Local(), 1.0),
        ("fedasam", {"r": 0.5, "a": 0.2}, Local(), 2.0 + 0.5 * 2.2),
        ("fedlesam", {"r": 0.5}, Local(own={"eps": one(-0.5)}), 1.5),
        ("fedspeed", {"r": 0.5, "alpha": 0.5, "lam": 10.0}, Local(own={"pull": one(0.0)}), 2.25 + 0.2),
    ],
    ids=str,
)
def test_hand_case(name, options, local, gradient):
    params, _ = create(name, weight_decay=0.1, **options).local_step(one(2.0), Quadratic(1.0), None, local, STEP)
    assert params.item() == pytest.approx(2.0 - 0.1 * (gradient + 0.1 * 2.0), rel=1e-14)


def test_fedlesam_looks_back_to_the_model_received_last():
    algorithm = bound("fedlesam", r=0.5)
    received = torch.zeros(P, dtype=torch.float64)
    state = algorithm.client_init(context(), Client(0, 9, STEPS))
    _, local = algorithm.local_init(received, {}, state, context(), None)
    assert torch.equal(local.own["eps"], torch.zeros(P, dtype=torch.float64))
    _, state = algorithm.local_finish(received, received + 1, {}, state, local, context())
    assert torch.equal(state["last"], received)
    assert state["last"].data_ptr() != received.data_ptr()
    _, local = algorithm.local_init(received + 2, {}, state, context(), None)
    torch.testing.assert_close(local.own["eps"], torch.full((P,), -0.5 / math.sqrt(P), dtype=torch.float64))
    _, local = algorithm.local_init(received, {}, state, context(), None)  # the model has not moved
    assert torch.equal(local.own["eps"], torch.zeros(P, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "options", "calls"),
    [
        ("fedsam", {}, 2),
        ("fedsam", {"r": 0.0}, 1),
        ("fedasam", {}, 2),
        ("fedspeed", {"alpha": 0.5}, 2),
        ("fedspeed", {"alpha": 1.0}, 2),
        ("fedspeed", {"alpha": 0.0}, 1),
        ("fedspeed", {"r": 0.0, "alpha": 0.5}, 1),
    ],
    ids=str,
)
def test_second_call_repeats_the_draws_and_leaves_buffers_alone(name, options, calls):
    start = torch.linspace(1.0, 2.0, P, dtype=torch.float64)
    grad_fn, batch = Quadratic(1.5), object()
    create(name, **options).gradient(start.clone(), grad_fn, batch, STEP)
    assert [call[1:] for call in grad_fn.calls] == [(batch, 77, True), (batch, 77, False)][:calls]
    assert torch.equal(grad_fn.calls[0][0], start)
    if calls == 2:
        r = create(name, **options).r
        away = grad_fn.calls[1][0] - start
        length = away / (start.abs() + 0.2) if name == "fedasam" else away
        assert length.norm().item() == pytest.approx(r, rel=1e-12)
        assert bool((away > 0).all())  # uphill


def test_fedlesam_needs_one_call():
    algorithm, grad_fn = create("fedlesam"), Quadratic(1.0)
    eps = torch.ones(P, dtype=torch.float64)
    algorithm.local_step(torch.ones(P, dtype=torch.float64), grad_fn, None, Local(own={"eps": eps}), STEP)
    assert [call[2:] for call in grad_fn.calls] == [(77, True)]
    assert torch.equal(grad_fn.calls[0][0], 2 * eps)


def client_round(algorithm, params, message, state, ctx, grad_fn):
    start, local = algorithm.local_init(params, message, state, ctx, None)
    moving = start.expand_as(grad_fn.centre).clone()
    for k in range(STEPS):
        moving, local = algorithm.local_step(moving, grad_fn, None, local, Step(k, STEPS, 1, 0.1, 0.1, k))
    return algorithm.local_finish(start, moving, message, state, local, ctx)


@pytest.mark.parametrize(("name", "options"), METHODS, ids=str)
def test_clients_together_are_clients_alone(name, options):
    """With a leading client dimension, every client gets what it gets alone."""
    draw = torch.Generator().manual_seed(1)
    algorithm = bound(name, **options)
    params, message_value = torch.randn(2, P, generator=draw, dtype=torch.float64)
    curvature, centre = torch.rand(2, CLIENTS, P, generator=draw, dtype=torch.float64)
    empty = algorithm.client_init(context(), Client(0, 9, STEPS))
    states = {key: torch.randn(CLIENTS, *value.shape, generator=draw).double() for key, value in empty.items()}
    if "seen" in states:
        states["seen"] = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    server = {key: message_value for key in algorithm.server_init(params)}
    received, message = algorithm.broadcast(server, params, context(), Client(0, 9, STEPS))
    untouched = copy.deepcopy((received, message, states))
    steps = torch.full((CLIENTS, 1), STEPS)
    upload, new = client_round(algorithm, received, message, states, context(steps), Quadratic(curvature, centre))
    for i in range(CLIENTS):
        own = {key: value[i] for key, value in states.items()}
        alone = client_round(algorithm, received, message, own, context(), Quadratic(curvature[i], centre[i]))
        for together, single in zip((upload, new), alone, strict=True):
            assert sorted(together) == sorted(single)
            for key, value in single.items():
                assert together[key].shape == (CLIENTS, *value.shape)
                torch.testing.assert_close(together[key][i], value, rtol=1e-13, atol=1e-13)
    for before, after in zip(untouched[1:], (message, states), strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(untouched[0], received)


def images(samples=24):
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 6, generator=draw, dtype=torch.float64)
    return [TensorDataset(x, torch.randint(3, (samples,), generator=draw))]


def trained(net, algorithm, rounds=1):
    sim = Simulation(
        copy.deepcopy(net), images(), algorithm, loss=F.cross_entropy, batch_size=6, fraction=1.0, rounds=rounds
    )
    for _ in range(rounds):
        sim.round()
    return sim


def test_running_statistics_move_once_a_step():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    plain = trained(net, create("fedavg", lr=1e-12))
    for name in ("fedsam", "fedasam", "fedspeed", "fedgamma"):
        sim = trained(net, create(name, lr=1e-12))
        assert sim.buffers["1.num_batches_tracked"].item() == 4
        for key in ("1.running_mean", "1.running_var"):  # those of the unperturbed model
            torch.testing.assert_close(sim.buffers[key], plain.buffers[key], rtol=0, atol=1e-9)


def test_dropout_masks_repeat():
    """With a ball of next to no radius the second gradient is the first one, unless other units are dropped."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3)).double()
    plain = trained(net, create("fedavg"), rounds=2)
    sharp = trained(net, create("fedsam", r=1e-9), rounds=2)
    torch.testing.assert_close(sharp.flat, plain.flat, rtol=0, atol=1e-7)
    assert (plain.flat - plain.learner.start).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        *[(name, {"r": -0.1}, "r=-0.1; expected 0 (no perturbation) or more") for name, _ in METHODS[:7]],
        ("fedsam", {"r": math.nan}, "r=nan"),
        ("fedlesam", {"r": math.inf}, "r=inf"),
        ("fedasam", {"a": -1.0}, "a=-1.0; expected 0 or more"),
        ("mofedsam", {"beta": 0.0}, "beta=0.0; expected 0 < beta <= 1"),
        ("fednsam", {"lam": 1.0}, "lam=1.0; expected 0 <= lam < 1"),
        ("fedspeed", {"alpha": 1.5}, "alpha=1.5; expected 0 <= alpha <= 1"),
        ("fedspeed", {"lam": 0.0}, "lam=0.0; expected more than 0"),
        ("fedspeed", {"dual_mean": "some"}, "dual_mean='some'; expected cohort or all"),
        ("fedgamma", {"weight_decay": -1.0}, "weight_decay=-1.0"),
        ("fedsam", {"rho": 0.1}, "no option 'rho'"),
    ],
    ids=str,
)
def test_options_out_of_range(name, options, text):
    with pytest.raises(UserError) as error:
        create(name, **options)
    assert text in str(error.value)
    assert "\n" not in str(error.value)
