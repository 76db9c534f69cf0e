"""The functions of the methods on local SGD, called by hand: identities of a round, many clients at once, options."""

import importlib.util
from pathlib import Path

import pytest
import torch
from fedcore.algorithms import create
from fedcore.ops.schedule import descend, local_rate, rate_sum
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("fedcore_sgd_drive", Path(__file__).with_name("_sgd_drive.py"))
drive = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(drive)

EXACT = {"rtol": 1e-12, "atol": 1e-13}
NAMES = ("fedavg", "fedprox", "scaffold", "fedcm", "fedacg", "feddyn", "fedswa", "fedmoswa", "server_swa")
rho_values = st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1))


# ---------------------------------------------------------------------- rates within a round


def test_rates_of_the_specification():
    rates = [local_rate(0.1, k, 4, 0.1) for k in range(4)]
    assert rates == pytest.approx([0.1, 0.0775, 0.055, 0.0325], rel=1e-15)
    assert rate_sum(0.1, 4, 0.1) == pytest.approx(0.265, rel=1e-15)
    assert rate_sum(1.0, 50, 0.1) == pytest.approx(27.95, rel=1e-15)


@settings(deadline=None)
@given(st.floats(1e-6, 10), st.integers(1, 200), rho_values)
def test_sum_of_rates(lr, steps, rho):
    rates = [local_rate(lr, k, steps, rho) for k in range(steps)]
    assert rates[0] == lr
    assert min(rates) > 0
    assert rates == sorted(rates, reverse=True)
    assert rate_sum(lr, steps, rho) == pytest.approx(sum(rates), rel=1e-12)


@settings(deadline=None)
@given(st.floats(1e-6, 10), st.integers(1, 200))
def test_steady_rate_is_exact(lr, steps):
    assert {local_rate(lr, k, steps, 1.0) for k in range(steps)} == {lr}
    assert rate_sum(lr, steps, 1.0) == lr * steps


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
@settings(deadline=None)
@given(st.floats(1e-3, 1), rho_values, st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_rates_of_many_clients(dtype, lr, rho, steps):
    several = torch.tensor(steps, dtype=dtype)[:, None]
    wide, close = (torch.float32, 1e-6) if dtype == torch.float32 else (torch.float64, 1e-14)
    for k in range(min(steps)):
        expected = torch.tensor([[local_rate(lr, k, one, rho)] for one in steps], dtype=wide)
        torch.testing.assert_close(local_rate(lr, k, several, rho), expected, rtol=close, atol=0)
    sums = torch.tensor([[rate_sum(lr, one, rho)] for one in steps], dtype=wide)
    torch.testing.assert_close(rate_sum(lr, several, rho), sums, rtol=close, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_descend_keeps_the_vector_and_its_format(dtype):
    params, direction = torch.randn(2, 5, dtype=dtype), torch.randn(2, 5, dtype=dtype)
    rates = torch.tensor([[0.1], [0.3]], dtype=torch.float64)
    expected = params.double() - rates * direction.double()
    found = descend(params, direction.clone(), rates)
    assert found is params
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------- option II, server steps


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), rho_values, st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 1.5]))
def test_option_two_is_the_weighted_mean_of_the_gradients_met(seed, steps, rho, decay, clip):
    world = drive.Quadratics(seed)
    algorithm = create("fedmoswa", rho=rho, weight_decay=decay, clip_grad=clip).bind(world.spec)
    server, state = {"m": world.vector()}, {"c": world.vector()}
    upload, new, met = drive.train(algorithm, world, 0, server, state, steps)
    met = [g * (min(1.0, clip / float(g.norm())) if clip else 1.0) + decay * params for params, g in met]
    rates = [local_rate(0.1, k, steps, rho) for k in range(steps)]
    expected = sum(rate * g for rate, g in zip(rates, met, strict=True)) / sum(rates)
    torch.testing.assert_close(new["c"], expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(upload["variate"], new["c"] - server["m"], **EXACT)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7))
def test_decay_is_part_of_the_variate(seed, steps):
    """With one step c_i^+ is the gradient at the model received, decay included; so it is in option I and SCAFFOLD."""
    world = drive.Quadratics(seed, steps=1)
    for name, key, options in (
        ("fedmoswa", "m", {"rho": 0.3}),
        ("fedmoswa", "m", {"option": "I"}),
        ("scaffold", "c", {}),
    ):
        algorithm = create(name, weight_decay=0.4, clip_grad=0.0, **options).bind(world.spec)
        _, new, _ = drive.train(algorithm, world, 1, {key: world.vector()}, {"c": world.vector()}, 1)
        expected = world.gradient(1, world.params, 0) + 0.4 * world.params
        torch.testing.assert_close(new["c"], expected, rtol=1e-10, atol=1e-11)


def test_divisor_of_the_code_is_short():
    for steps, short in ((50, 0.0161), (4, 0.1698)):
        exact, code = (
            create("fedmoswa", divisor=divisor)._divisor(drive.context(steps)) for divisor in ("exact", "code")
        )
        assert 1 - code / exact == pytest.approx(short, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 3), st.sampled_from(["fedswa", "fedmoswa"]))
def test_server_step_is_linear_in_alpha(seed, alpha, name):
    world = drive.Quadratics(seed)
    reduced = {"delta": world.vector(), "variate": world.vector()}
    server = {"m": world.vector()} if name == "fedmoswa" else {}
    moves = []
    for step in (1.0, alpha):
        new, _ = create(name, alpha=step).server_step(server, world.params, reduced, drive.context(5))
        moves.append(new - world.params)
    torch.testing.assert_close(moves[1], alpha * moves[0], rtol=1e-11, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(0, 3))
def test_server_variate_is_a_moving_average(seed, gamma, round):
    world = drive.Quadratics(seed)
    m, variates = world.vector(), world.vector(4)
    algorithm = create("fedmoswa", gamma=gamma, first_round_gamma=1.0)
    reduced = {"delta": world.vector(), "variate": (variates - m).mean(dim=0)}
    _, server = algorithm.server_step({"m": m}, world.params, reduced, drive.context(5, round=round))
    used = 1.0 if round == 0 else gamma
    torch.testing.assert_close(server["m"], (1 - used) * m + used * variates.mean(dim=0), rtol=1e-11, atol=1e-12)


# ---------------------------------------------------------------------- many clients in one computation


def options_of(name):
    every = {"weight_decay": 0.05, "clip_grad": 1.5}
    return [every, {**every, "option": "I"}, {**every, "divisor": "code"}] if name == "fedmoswa" else [every]


@pytest.mark.parametrize("name", NAMES)
def test_many_clients_equal_one_by_one(name):
    """Unequal steps, own states: the functions take a leading client dimension and (clients, 1) steps."""
    steps = [3, 7, 1]
    for options in options_of(name):
        for dtype in (torch.int64, torch.float64):
            world = drive.Quadratics(5)
            algorithm = create(name, **options).bind(world.spec)
            server = {key: world.vector() for key in algorithm.server_init(world.params) if key != "count"}
            states = {key: world.vector(3) for key in algorithm.client_init(drive.context(3), None)}
            several = torch.tensor(steps, dtype=dtype)[:, None]
            upload, new, _ = drive.train(algorithm, world, slice(None), server, states, several)
            for i, one in enumerate(steps):
                own = {key: value[i] for key, value in states.items()}
                expected, expected_state, _ = drive.train(algorithm, world, i, server, own, one)
                for found, wanted in ((upload, expected), (new, expected_state)):
                    assert sorted(found) == sorted(wanted)
                    for key, value in wanted.items():
                        torch.testing.assert_close(found[key][i], value, **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_left_alone_and_float32_stays(name):
    world = drive.Quadratics(1, dtype=torch.float32)
    for options in options_of(name):
        algorithm = create(name, **options).bind(world.spec)
        server = {key: world.vector() for key in algorithm.server_init(world.params) if key != "count"}
        state = {key: world.vector() for key in algorithm.client_init(drive.context(3), None)}
        kept = [{key: value.clone() for key, value in tree.items()} for tree in (server, state)]
        params = world.params.clone()
        upload, new, _ = drive.train(algorithm, world, 2, server, state, 4)
        full = {**server, "count": torch.zeros((), dtype=torch.int64)} if name == "server_swa" else server
        moved, after = algorithm.server_step(full, world.params, upload, drive.context(4, round=9))
        assert torch.equal(params, world.params)
        for tree, before in zip((server, state), kept, strict=True):
            assert all(torch.equal(tree[key], before[key]) for key in before)
        floats = [*upload.values(), *new.values(), moved, *(v for k, v in after.items() if k != "count")]
        assert {value.dtype for value in floats} == {torch.float32}


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedswa", {"rho": 1.1}),
        ("fedswa", {"rho": -0.1}),
        ("fedswa", {"alpha": 0.0}),
        ("fedswa", {"rho": float("nan")}),
        ("fedmoswa", {"gamma": 1.5}),
        ("fedmoswa", {"gamma": -0.1}),
        ("fedmoswa", {"first_round_gamma": 2.0}),
        ("fedmoswa", {"option": "III"}),
        ("fedmoswa", {"divisor": "sum"}),
        ("fedmoswa", {"alpha": -1.0}),
        ("fedprox", {"mu": -0.1}),
        ("fedcm", {"beta": 0.0}),
        ("fedcm", {"beta": 1.2}),
        ("fedacg", {"lam": 1.0}),
        ("fedacg", {"b": -1.0}),
        ("feddyn", {"a": 0.0}),
        ("server_swa", {"share": 0.0}),
        ("server_swa", {"share": 1.2}),
    ],
)
def test_option_out_of_range(name, options):
    (key,) = options
    with pytest.raises(UserError, match=f"^{key}=.*; expected ") as caught:
        create(name, **options)
    assert "\n" not in str(caught.value)


def test_defaults_of_the_papers():
    swa, momentum = create("fedswa"), create("fedmoswa")
    assert (swa.rho, swa.alpha, swa.lr, swa.lr_decay, swa.weight_decay, swa.clip_grad) == (
        0.1,
        1.5,
        0.1,
        0.998,
        1e-3,
        10,
    )
    assert (momentum.rho, momentum.alpha, momentum.gamma, momentum.option) == (0.1, 1.5, 0.2, "II")
    assert (momentum.first_round_gamma, momentum.divisor) == (None, "exact")
    assert (create("fedprox").mu, create("fedcm").beta, create("feddyn").a) == (0.01, 0.1, 0.01)
    assert (create("fedacg").lam, create("fedacg").b, create("server_swa").share) == (0.85, 0.01, 0.25)
