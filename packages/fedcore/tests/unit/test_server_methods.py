"""The adaptive servers by hand, against torch's optimizers, and their options."""

import math

import pytest
import torch
from fedcore.algorithm import Context
from fedcore.algorithms import create
from polymodal.errors import UserError


def context(round):
    return Context(round=round, rounds=9, num_clients=4, cohort=2, lr=0.1, last_lr=0.1, steps=3, max_steps=3)


def serve(algorithm, moves, start):
    """Parameters after each of the mean moves, and the last server state."""
    params, found = start, []
    server = algorithm.server_init(params)
    for t, move in enumerate(moves):
        params, server = algorithm.server_step(server, params, {"delta": move}, context(t))
        found.append(params)
    return found, server


@pytest.mark.parametrize("kind", ["fedadam", "fedyogi"])
def test_hand_case(kind):
    """Mean move 1 and v0 = 0: m = 0.1, v = 0.01, so the step is eta_s * 0.1 / (0.1 + tau)."""
    algorithm = create(kind, eta_s=0.03, tau=1e-3, v0=0.0)
    (params,), server = serve(algorithm, [torch.ones(1, dtype=torch.float64)], torch.zeros(1, dtype=torch.float64))
    assert server["m"].item() == pytest.approx(0.1, rel=1e-14)
    assert server["v"].item() == pytest.approx(0.01, rel=1e-14)
    assert params.item() == pytest.approx(0.03 * 0.1 / (0.1 + 1e-3), rel=1e-14)


def test_hand_case_of_adagrad():
    """Moves 1 and 2 from v = tau^2: v = 1 + tau^2, then 5 + tau^2; no momentum."""
    tau = 0.5
    moves = [torch.ones(1, dtype=torch.float64), torch.full((1,), 2.0, dtype=torch.float64)]
    found, server = serve(create("fedadagrad", eta_s=0.1, tau=tau), moves, torch.zeros(1, dtype=torch.float64))
    first = 0.1 / (math.sqrt(1 + tau**2) + tau)
    assert found[0].item() == pytest.approx(first, rel=1e-14)
    assert found[1].item() == pytest.approx(first + 0.2 / (math.sqrt(5 + tau**2) + tau), rel=1e-14)
    assert server["v"].item() == pytest.approx(5 + tau**2, rel=1e-14)


def test_yogi_falls_by_no_more_than_the_square_of_the_move():
    v, small = torch.ones(1, dtype=torch.float64), torch.full((1,), 0.1, dtype=torch.float64)
    assert create("fedyogi").second_moment(v, small).item() == pytest.approx(1 - 0.01 * 0.01, rel=1e-14)
    assert create("fedadam").second_moment(v, small).item() == pytest.approx(0.99 + 0.01 * 0.01, rel=1e-14)
    assert create("fedyogi").second_moment(v, v).item() == 1.0  # sign(0) is 0


MOVES = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def optimised(optimizer, parameter):
    """Parameters after each step of a torch optimizer that is given minus the mean moves as gradients."""
    found = []
    for move in MOVES:
        parameter.grad = -move
        optimizer.step()
        found.append(parameter.detach().clone())
    return found


def test_corrected_adam_is_torch_adam():
    """torch adds eps after dividing the root by the correction, which is the same where eps is next to nothing."""
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    wanted = optimised(torch.optim.Adam([parameter], lr=0.02, betas=(0.8, 0.95), eps=1e-16), parameter)
    algorithm = create("fedadam", eta_s=0.02, b1=0.8, b2=0.95, tau=1e-16, v0=0.0, bias_correction=True)
    found, _ = serve(algorithm, MOVES, torch.zeros(5, dtype=torch.float64))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_adagrad_is_torch_adagrad():
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.Adagrad([parameter], lr=0.02, eps=0.01, initial_accumulator_value=0.3)
    found, _ = serve(create("fedadagrad", eta_s=0.02, tau=0.01, v0=0.3), MOVES, torch.zeros(5, dtype=torch.float64))
    for one, other in zip(found, optimised(optimizer, parameter), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", ["fedadam", "fedyogi", "fedadagrad"])
def test_arguments_are_left_as_they_are(kind):
    algorithm, params, move = create(kind, b1=0.3), torch.ones(4), torch.arange(4.0)
    server = algorithm.server_init(params)
    kept = {name: value.clone() for name, value in server.items()}
    algorithm.server_step(server, params, {"delta": move}, context(0))
    assert torch.equal(params, torch.ones(4))
    assert torch.equal(move, torch.arange(4.0))
    for name, value in kept.items():
        assert torch.equal(server[name], value)


@pytest.mark.parametrize("kind", ["fedadam", "fedyogi", "fedadagrad"])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"eta_s": 0.0}, "eta_s=0.0; expected more than 0"),
        ({"b1": 1.0}, "b1=1.0; expected 0 <= b1 < 1"),
        ({"b2": -0.1}, "b2=-0.1; expected 0 <= b2 <= 1"),
        ({"tau": 0.0}, "tau=0.0; expected more than 0"),
        ({"v0": -1.0}, "v0=-1.0; expected 0 or more"),
        ({"tau": math.nan}, "tau=nan"),
        ({"b2": 1.0, "bias_correction": True}, "bias_correction=True; expected false where b2 is 1"),
        ({"lr": -1.0}, "lr=-1.0"),
    ],
    ids=str,
)
def test_options_out_of_range(kind, options, text):
    with pytest.raises(UserError) as error:
        create(kind, **options)
    assert text in str(error.value)
    assert "\n" not in str(error.value)
