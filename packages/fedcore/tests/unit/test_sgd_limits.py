"""Limit cases and invariants of the methods on local SGD, through ``Simulation`` on softmax regression in float64."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from fedcore.algorithms import create
from hypothesis import given, settings
from hypothesis import strategies as st


def _load(name):
    path = Path(__file__).parents[1] / "golden" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"fedcore_sgd_limits{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


softmax, run = _load("_softmax"), _load("_run")

PARTIAL = [[0, 3], [1, 2, 4], [3], [0, 1, 4], [2, 3]]
few = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 10**6)
# One to four clients of one to nine samples, and two or three rounds with some of them in each.
federations = st.lists(st.integers(1, 9), min_size=1, max_size=4).flatmap(
    lambda sizes: st.tuples(
        st.just(tuple(sizes)),
        st.lists(st.sets(st.integers(0, len(sizes) - 1), min_size=1).map(sorted), min_size=2, max_size=3),
    )
)


def thetas(name, problem, *, given=None, **options):
    """Parameters after each round (rounds, P), and the simulation; ``given`` are options of the run."""
    found, sim = run.trajectory(create(name, **options), problem, **(given or {"cohorts": PARTIAL}))
    return np.stack(found), sim


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


# ---------------------------------------------------------------------- what equals FedAvg, bit for bit

PLAIN = [
    ("fedswa", {"rho": 1.0, "alpha": 1.0}),
    ("fedprox", {"mu": 0.0}),
    ("fedacg", {"lam": 0.0, "b": 0.0}),
    ("fedcm", {"beta": 1.0}),
    ("server_swa", {}),
]


@pytest.mark.parametrize(("name", "options"), PLAIN)
@few
@given(seeds, federations, st.booleans())
def test_equals_fedavg_bit_for_bit(name, options, seed, federation, shuffle):
    sizes, cohorts = federation
    problem = softmax.make(seed, sizes)
    given = {"cohorts": cohorts, "shuffle": shuffle, "seed": seed}
    base = {"lr": 0.3, "clip_grad": 1.0, "weight_decay": 0.01}
    expected, _ = thetas("fedavg", problem, given=given, **base)
    found, _ = thetas(name, problem, given=given, **base, **options)
    assert np.array_equal(found, expected)


def test_prox_without_momentum_is_fedprox():
    problem = softmax.make(2)
    expected, _ = thetas("fedprox", problem, mu=0.4)
    assert np.array_equal(thetas("fedacg", problem, lam=0.0, b=0.4)[0], expected)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_first_round_of_fedcm_is_fedavg_at_a_smaller_rate(beta):
    problem = softmax.make(4)
    close(thetas("fedcm", problem, beta=beta)[0][0], thetas("fedavg", problem, lr=0.1 * beta)[0][0])


# ---------------------------------------------------------------------- FedMoSWA


@few
@given(seeds, st.integers(1, 4), st.integers(1, 6))
def test_fedmoswa_with_everyone_is_scaffold(seed, clients, batch_size):
    problem = softmax.make(seed, [3 + 2 * i for i in range(clients)])
    given = {"rounds": 4, "batch_size": batch_size}
    expected, scaffold = thetas("scaffold", problem, given=given, lr=0.2)
    found, momentum = thetas("fedmoswa", problem, given=given, lr=0.2, rho=1.0, alpha=1.0, gamma=1.0)
    close(found, expected)
    close(momentum.server_state["m"], scaffold.server_state["c"], 1e-11)
    for i in range(clients):
        close(momentum.client_states[i]["c"], scaffold.client_states[i]["c"], 1e-11)


@few
@given(seeds, federations, st.floats(0, 1), st.floats(0.1, 2), st.sampled_from(["I", "II"]))
def test_first_round_of_fedmoswa_is_fedswa(seed, federation, rho, alpha, option):
    sizes, cohorts = federation
    problem = softmax.make(seed, sizes)
    expected, _ = thetas("fedswa", problem, given={"cohorts": cohorts[:1]}, rho=rho, alpha=alpha)
    found, _ = thetas("fedmoswa", problem, given={"cohorts": cohorts[:1]}, rho=rho, alpha=alpha, option=option)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("option", ["I", "II"])
def test_gamma_zero_keeps_the_server_variate_at_zero(option):
    _, sim = thetas("fedmoswa", softmax.make(1), gamma=0.0, option=option)
    assert not sim.server_state["m"].any()
    assert all(state["c"].any() for state in sim.client_states.values())


@pytest.mark.parametrize("option", ["I", "II"])
@pytest.mark.parametrize("options", [{"gamma": 1.0}, {"gamma": 0.0, "first_round_gamma": 1.0}])
def test_gamma_one_forgets_all_rounds_but_the_last(options, option):
    sim = run.simulation(create("fedmoswa", option=option, **options), softmax.make(1), cohorts=PARTIAL)
    for cohort in PARTIAL[: 5 if options["gamma"] else 1]:
        sim.round()
        close(sim.server_state["m"], torch.stack([sim.client_states[i]["c"] for i in cohort]).mean(dim=0))


@few
@given(seeds, st.integers(1, 12), st.floats(0, 1))
def test_one_client_with_gamma_one_is_fedswa(seed, samples, rho):
    problem = softmax.make(seed, [samples])
    expected, _ = thetas("fedswa", problem, given={"rounds": 5}, rho=rho)
    found, sim = thetas("fedmoswa", problem, given={"rounds": 5}, rho=rho, gamma=1.0)
    close(found, expected)
    close(sim.server_state["m"], sim.client_states[0]["c"])


def test_option_one_is_the_gradient_at_the_model_received():
    problem = softmax.make(6)
    sim = run.simulation(create("fedmoswa", option="I", weight_decay=0.3, clip_grad=0.5), problem, cohorts=PARTIAL)
    for cohort in PARTIAL:
        theta = sim.flat.numpy().copy()
        sim.round()
        for i in cohort:
            grad = softmax.full_gradient(theta, problem, i)
            close(sim.client_states[i]["c"], softmax.clipped(grad, 0.5) + 0.3 * theta)


@few
@given(seeds, federations, st.floats(0.1, 2))
def test_alpha_stretches_the_move_of_a_round(seed, federation, alpha):
    sizes, cohorts = federation
    problem, given = softmax.make(seed, sizes), {"cohorts": cohorts[:1]}
    one, found = (thetas("fedmoswa", problem, given=given, alpha=a)[0][0] - problem.start for a in (1.0, alpha))
    close(found, alpha * one)


# ---------------------------------------------------------------------- SCAFFOLD and FedDyn


@few
@given(seeds, federations)
def test_server_variables_are_means_over_all_clients(seed, federation):
    sizes, cohorts = federation
    problem = softmax.make(seed, sizes)
    for name, key, options in (("scaffold", "c", {}), ("feddyn", "h", {"a": 0.2})):
        _, sim = thetas(name, problem, given={"cohorts": cohorts}, **options)
        total = sum(state[key] for state in sim.client_states.values())
        close(sim.server_state[key], total / len(sizes))


@few
@given(seeds, st.integers(1, 12))
def test_scaffold_with_one_client_is_fedavg(seed, samples):
    problem = softmax.make(seed, [samples])
    expected, _ = thetas("fedavg", problem, given={"rounds": 5})
    close(thetas("scaffold", problem, given={"rounds": 5})[0], expected)


@few
@given(seeds, federations, st.floats(0.01, 1))
def test_first_round_of_feddyn_is_fedprox_stretched(seed, federation, a):
    """Local models are FedProx's; the server adds what h/a takes back, s/N of the move."""
    sizes, cohorts = federation
    problem, given = softmax.make(seed, sizes), {"cohorts": cohorts[:1]}
    prox = thetas("fedprox", problem, given=given, mu=a)[0][0] - problem.start
    found = thetas("feddyn", problem, given=given, a=a)[0][0] - problem.start
    close(found, (1 + len(cohorts[0]) / len(sizes)) * prox)


# ---------------------------------------------------------------------- fixed points: what removes drift, and what not


def slope(theta, problem, decay):
    """Norm of the gradient of the mean of the clients' losses."""
    grads = [softmax.full_gradient(theta, problem, i) for i in problem.everyone]
    return float(np.linalg.norm(np.mean(grads, axis=0) + decay * theta))


FIXED = [
    ("scaffold", {}, True),
    ("fedmoswa", {"gamma": 0.6}, True),
    ("fedmoswa", {"rho": 0.0, "alpha": 1.0, "gamma": 0.8}, True),
    ("fedmoswa", {"option": "I", "gamma": 0.6}, True),
    ("feddyn", {"a": 0.5}, True),
    ("fedavg", {}, False),
    ("fedswa", {}, False),
    ("fedprox", {"mu": 0.5}, False),
    ("fedacg", {}, False),
]


@pytest.mark.parametrize(("name", "options", "unbiased"), FIXED)
def test_where_training_on_unlike_clients_ends(name, options, unbiased):
    """Constant rate, whole batches, everyone in every round: only variates and dual variables end at the minimum."""
    problem, decay, rounds = softmax.make(8, (4, 6, 5)), 0.3, 40
    base = {"lr": 0.4, "round_lr": "constant", "weight_decay": decay, "clip_grad": 0.0}
    sim = run.simulation(create(name, **base, **options), problem, rounds=rounds, batch_size=6, local_epochs=3)
    for _ in range(rounds):
        sim.round()
    found = slope(sim.flat.numpy(), problem, decay)
    assert found < 1e-5 if unbiased else found > 1e-2, found


# ---------------------------------------------------------------------- everything else that must not matter

ALL = ["fedavg", "fedprox", "scaffold", "fedcm", "fedacg", "feddyn", "fedswa", "fedmoswa", "server_swa"]
STATE = {"scaffold": "c", "fedmoswa": "c", "feddyn": "h"}


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedcm", "fedswa", "fedmoswa"])
def test_twice_the_loss_at_half_the_rate(name):
    problem = softmax.make(3)
    base = {"weight_decay": 0.0, "clip_grad": 0.0}
    expected, one = thetas(name, problem, **base, lr=0.2)
    found, two = thetas(name, problem, given={"cohorts": PARTIAL, "loss_scale": 2.0}, **base, lr=0.1)
    close(found, expected, 1e-14)
    for key, value in one.server_state.items():
        close(two.server_state[key], 2 * value, 1e-13)
    for i, state in one.client_states.items():
        close(two.client_states[i]["c"], 2 * state["c"], 1e-13)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=3, deadline=None)
@given(seeds, st.permutations(range(4)), st.randoms())
def test_order_and_names_of_clients(name, seed, names, random):
    """Cohorts in another order are the same bits; clients under other numbers give the same within rounding."""
    problem, cohorts = softmax.make(seed, (5, 3, 8, 4)), [[0, 2, 3], [1, 2], [0, 1, 2, 3]]
    expected, sim = thetas(name, problem, given={"cohorts": cohorts})
    mixed = [random.sample(cohort, len(cohort)) for cohort in cohorts]
    assert np.array_equal(thetas(name, problem, given={"cohorts": mixed})[0], expected)
    renamed = problem._replace(inputs=[problem.inputs[i] for i in names], targets=[problem.targets[i] for i in names])
    where = {old: new for new, old in enumerate(names)}
    found, other = thetas(name, renamed, given={"cohorts": [[where[i] for i in cohort] for cohort in cohorts]})
    close(found, expected)
    for i, state in sim.client_states.items():
        for key, value in state.items():
            close(other.client_states[where[i]][key], value, 1e-11)


@pytest.mark.parametrize("name", STATE)
def test_state_of_a_client_waits_for_its_next_round(name):
    """Nothing of the other clients leaks into it, and a new client starts from zero, not from who came before."""
    problem, key = softmax.make(1), STATE[name]
    sim = run.simulation(create(name), problem, cohorts=PARTIAL)
    kept = {}
    for cohort in PARTIAL:
        sim.round()
        for i, value in kept.items():
            assert torch.equal(sim.client_states[i][key], value) == (i not in cohort), i
        kept = {i: state[key].clone() for i, state in sim.client_states.items()}
        assert set(kept) >= set(cohort)
    assert len({tuple(value.tolist()) for value in kept.values()}) == 5


@pytest.mark.parametrize("name", ALL)
def test_resumed_run_is_bit_identical(name):
    problem, options = softmax.make(1), {"cohorts": PARTIAL, "shuffle": True, "seed": 4}
    whole = run.simulation(create(name, round_lr="cosine"), problem, **options)
    broken = run.simulation(create(name, round_lr="cosine"), problem, **options)
    for _ in range(2):
        whole.round()
        broken.round()
    saved = broken.state_dict()
    resumed = run.simulation(create(name, round_lr="cosine"), problem, **options)
    resumed.load_state_dict(saved)
    for _ in range(3):
        whole.round()
        resumed.round()
    assert torch.equal(whole.flat, resumed.flat)
    assert torch.equal(whole.evaluation_flat, resumed.evaluation_flat)
    assert all(torch.equal(value, resumed.server_state[key]) for key, value in whole.server_state.items())
    for i, state in whole.client_states.items():
        assert all(torch.equal(value, resumed.client_states[i][key]) for key, value in state.items())


@pytest.mark.parametrize("name", ALL)
def test_bytes_of_a_round(name):
    up = 2 if name in ("scaffold", "fedmoswa") else 1
    down = 2 if name in ("scaffold", "fedmoswa", "fedcm") else 1
    row = run.simulation(create(name), softmax.make(1), cohorts=[[0, 3]]).round()
    assert (row["comm/up_bytes"], row["comm/down_bytes"]) == (2 * 15 * 8 * up, 2 * 15 * 8 * down)


# ---------------------------------------------------------------------- averaging on the server


def test_server_average_is_evaluated_and_never_trained_from():
    problem = softmax.make(5)
    sim = run.simulation(create("server_swa"), problem, rounds=8)
    flats = []
    for _ in range(8):
        sim.round()
        flats.append(sim.flat.clone())
        late = flats[6:]
        close(sim.evaluation_flat, torch.stack(late).mean(dim=0) if late else flats[-1])
    assert int(sim.server_state["count"]) == 2
    x, y = problem.inputs[1], problem.targets[1]
    loss = sim.evaluate(run.datasets(problem)[1])["loss"]
    assert loss == pytest.approx(softmax.loss(sim.evaluation_flat.numpy(), x, y, 3), rel=1e-12)
    assert loss != pytest.approx(softmax.loss(sim.flat.numpy(), x, y, 3), rel=1e-6)


def test_server_average_of_one_round_is_fedavg():
    for rounds in (1, 2, 4):
        _, sim = thetas("server_swa", softmax.make(5), given={"rounds": rounds})
        assert torch.equal(sim.evaluation_flat, sim.flat)
