"""Adam's step and the local step of its federated forms, by hand: against torch.optim, clipping, gaps, formats."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from fedcore.algorithms import create
from fedcore.ops.adam import adam_step_, capped_adam_step_, moment_dtype
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

_spec = importlib.util.spec_from_file_location("fedcore_adamw_drive", Path(__file__).with_name("_adamw_drive.py"))
drive = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(drive)

FORMS = ("local_adamw", "fedadamw", "agg_v", "agg_m", "agg_vm", "fedcm_adamw", "scaffold_adamw")
COUPLED = ("local_adam", "fedlada")
EXACT = {"rtol": 1e-12, "atol": 1e-14}


def centralised(params, gradients, lr, decay=0.01, cls=torch.optim.AdamW):
    """Parameters and second moment of one uninterrupted optimiser of torch on given gradients."""
    weight = nn.Parameter(params.clone())
    optimizer = cls([weight], lr=lr, weight_decay=decay, foreach=False, fused=False)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer.state[weight]["exp_avg_sq"]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(1e-6, 1.0),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([0.0, 0.9, 0.999, 0.9999]),
    st.sampled_from([1e-8, 1e-3]),
    st.sampled_from([0.0, 1e-5, 0.3]),
    st.integers(1, 400),
    st.integers(1, 400),
    st.sampled_from([(7,), (64,), (3, 21)]),
)
def test_step_is_the_formula(seed, rate, b1, b2, eps, decay, k, t, shape):
    draw = torch.Generator().manual_seed(seed)
    x, g, m = (torch.randn(*shape, generator=draw, dtype=torch.float64) for _ in range(3))
    v = torch.rand(*shape, generator=draw, dtype=torch.float64)
    c1, c2 = 1 - b1**k, 1 - b2**t
    new_m, new_v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    move = (new_m / c1) / (torch.sqrt(new_v / c2) + eps)
    numbers = {"rate": rate, "b1": b1, "b2": b2, "eps": eps, "c1": c1, "c2": c2, "decay": decay}
    for step, expected in ((adam_step_, move), (capped_adam_step_, move.clamp(-1.0, 1.0))):
        own = [value.clone() for value in (x, g, m, v)]
        step(*own, **numbers)
        torch.testing.assert_close(own[0], (1 - decay) * x - rate * expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(own[2], new_m, **EXACT)
        torch.testing.assert_close(own[3], new_v, **EXACT)


def test_a_step_takes_bfloat16_and_strided_parameters_with_float32_moments():
    draw = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 4, 9, generator=draw).unbind()
    for params in (x.to(torch.bfloat16), torch.zeros(9, 4).t().copy_(x)):
        m, v = torch.zeros(4, 9), torch.zeros(4, 9)
        expected = params.float() * 0.9 - 0.1 * torch.sign(g)
        adam_step_(params, g.to(params.dtype), m, v, rate=0.1, b1=0.9, b2=0.999, eps=1e-12, c1=0.1, c2=1e-3, decay=0.1)
        assert moment_dtype(params.dtype) == torch.float32 == v.dtype
        torch.testing.assert_close(
            params.float(), expected, rtol=1e-2 if params.dtype == torch.bfloat16 else 1e-5, atol=0
        )


@pytest.mark.parametrize("name", [*FORMS, *COUPLED])
def test_bfloat16_parameters_have_float32_moments(name):
    grad_fn = drive.Recorder(seed=1, dtype=torch.bfloat16)
    for _, mean, params, server in drive.rounds(create(name, lr=0.1), grad_fn, [0.1, 0.1], [3, 2], (0, 1)):
        assert params.dtype == torch.bfloat16
        assert params.isfinite().all()
        for moment in {"m", "v"} & set(server):
            assert server[moment].dtype == mean[moment].dtype == torch.float32


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(FORMS), st.sampled_from([0.0, 0.01, 0.4]), st.integers(1, 6))
def test_first_round_of_one_client_is_adamw_of_torch(seed, name, decay, steps):
    options = {"beta": 1.0} if name == "fedcm_adamw" else {"cap": 10.0} if name == "agg_m" else {}
    algorithm = create(name, lr=0.1, weight_decay=decay, clip_grad=0.0, **options)
    grad_fn = drive.Recorder(seed)
    ((_, _, params, _),) = drive.rounds(algorithm, grad_fn, [0.1], [steps])
    expected, _ = centralised(grad_fn.params, grad_fn.met, 0.1, decay)
    torch.testing.assert_close(params, expected, **EXACT)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_local_adam_is_adam_of_torch(decay):
    grad_fn = drive.Recorder(seed=3)
    algorithm = create("local_adam", lr=0.1, weight_decay=decay, clip_grad=0.0)
    ((_, _, params, _),) = drive.rounds(algorithm, grad_fn, [0.1], [5])
    expected, _ = centralised(grad_fn.params, grad_fn.met, 0.1, decay, torch.optim.Adam)
    torch.testing.assert_close(params, expected, **EXACT)


def test_both_moments_carried_by_one_client_are_adamw_without_interruption():
    grad_fn = drive.Recorder(seed=4)
    *_, (_, _, params, server) = drive.rounds(create("agg_vm", clip_grad=0.0), grad_fn, [0.1] * 4, [5])
    expected, v = centralised(grad_fn.params, grad_fn.met, 0.1)
    torch.testing.assert_close(params, expected, **EXACT)
    torch.testing.assert_close(server["v"], v, **EXACT)


@pytest.mark.parametrize(("name", "options"), [("fedadamw", {"alpha": 0.0, "v_blocks": "full"}), ("agg_v", {})])
def test_full_v_of_one_client_is_that_of_adamw_without_interruption(name, options):
    grad_fn = drive.Recorder(seed=5)
    *_, (_, _, _, server) = drive.rounds(create(name, clip_grad=0.0, **options), grad_fn, [0.1, 0.07, 0.02], [4])
    _, v = centralised(grad_fn.params, grad_fn.met, 0.1)
    torch.testing.assert_close(server["v"], v, **EXACT)


@pytest.mark.parametrize("name", [*FORMS, *COUPLED])
def test_the_clip_meets_the_gradient_before_anything_else(name):
    """Correction, mixture and decay are added to the clipped gradient, and may exceed the bound."""
    seen = []
    algorithm = create(name, lr=0.1, clip_grad=0.5, weight_decay=3.0)
    grad_fn = drive.Recorder(seed=6)
    bound = algorithm.bind(grad_fn.spec)
    kept = type(bound).adjusted

    def spy(self, grad, local, step):
        seen.append(grad.clone())
        return kept(self, grad, local, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(bound), "adjusted", spy)
        list(drive.rounds(algorithm, grad_fn, [0.1, 0.1], [3, 2], (0, 1)))
    for raw, clipped in zip(grad_fn.met, seen, strict=True):
        torch.testing.assert_close(clipped, raw * min(1.0, 0.5 / float(raw.norm())), **EXACT)
    assert min(float(raw.norm()) for raw in grad_fn.met) > 0.5


@pytest.mark.parametrize("name", [*FORMS, *COUPLED])
def test_a_tensor_without_gradient_is_left_alone_with_its_moments(name):
    """Also where corrections, decay or a direction would move it: v stays, so a step there would have no scale."""
    grad_fn = drive.Recorder(seed=7)
    weight = grad_fn.spec.info("weight")
    last = None
    for i, (start, _, params, server) in enumerate(_rounds_with_gap(create(name, lr=0.1), grad_fn)):
        gone = i == 1
        moved = (params - start)[weight.start : weight.stop].abs().max()
        assert (moved == 0.0) if gone else (moved > 1e-3)
        assert (params - start)[weight.stop :].abs().max() > 1e-3
        if gone and "v" in server:
            size = weight.stop if name != "fedadamw" else 3
            torch.testing.assert_close(server["v"][:size], last["v"][:size], **EXACT)
            assert (server["v"][size:] != last["v"][size:]).all()
        assert params.isfinite().all()
        last = server


def _rounds_with_gap(algorithm, grad_fn):
    weight = grad_fn.spec.info("weight")
    driven = drive.rounds(algorithm, grad_fn, [0.1] * 3, [4])
    for missing in ((), ((weight.start, weight.stop),), ()):
        grad_fn.missing = missing
        yield next(driven)


@pytest.mark.parametrize("name", [*FORMS, *COUPLED])
@pytest.mark.parametrize("gap", [False, True])
def test_clients_together_are_clients_apart(name, gap):
    """The client dimension, with unequal K: what the batched engine relies on."""
    grad_fn = drive.Recorder(seed=8)
    algorithm = create(name, lr=0.1, clip_grad=1.0, no_decay_1d=True).bind(grad_fn.spec)
    *_, (_, _, params, server) = drive.rounds(algorithm, grad_fn, [0.1, 0.1], [3, 5], (0, 1))
    grad_fn.missing = ((12, 15),) if gap else ()
    steps, apart, states = torch.tensor([[4], [7], [1]]), [], []
    for grad_fn.which in range(3):
        upload, state, _ = drive.train(algorithm, grad_fn, params, server, int(steps[grad_fn.which]))
        apart.append(upload)
        states.append(state)
    grad_fn.which = slice(None)
    together, kept, _ = drive.train(algorithm, grad_fn, params, server, steps)
    for key, value in together.items():
        torch.testing.assert_close(value, torch.stack([upload[key] for upload in apart]), rtol=1e-12, atol=1e-13)
    for key, value in kept.items():
        torch.testing.assert_close(value, torch.stack([state[key] for state in states]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("no_decay_1d", [False, True])
def test_without_gradient_decay_alone_shrinks_the_parameters(name, no_decay_1d):
    """In the first round: from the second on, FedAdamW and FedCM-AdamW take the decay of the last for a direction."""
    grad_fn = drive.Recorder(seed=9)
    grad_fn.curvature.zero_()
    algorithm = create(name, lr=0.05, weight_decay=0.2, no_decay_1d=no_decay_1d)
    ((_, _, params, _),) = drive.rounds(algorithm, grad_fn, [0.05], [6])
    shrink = torch.full_like(params, (1 - 0.05 * 0.2) ** 6)
    if no_decay_1d:
        shrink[grad_fn.spec.info("bias").start :] = 1.0
    torch.testing.assert_close(params, grad_fn.params * shrink, rtol=1e-13, atol=0)
    assert float(params.norm()) == pytest.approx(float((grad_fn.params * shrink).norm()), rel=1e-13)


def test_an_uncapped_first_moment_over_a_fresh_second_runs_away():
    """Why agg-m has a cap: with it no coordinate moves by more than K times the rate."""
    moves = {}
    for cap in (1.0, math.inf):
        grad_fn = drive.Recorder(seed=10)
        algorithm = create("agg_m", lr=0.1, weight_decay=0.0, clip_grad=0.0, cap=cap)
        driven = drive.rounds(algorithm, grad_fn, [0.1] * 3, [5])
        next(driven)
        grad_fn.curvature = grad_fn.curvature * 1e-6  # small gradients from the second round on
        moves[cap] = max(float((params - before).abs().max()) for before, _, params, _ in driven)
    assert moves[1.0] <= 5 * 0.1 * (1 + 1e-12) < 100 * 0.1 < moves[math.inf]
