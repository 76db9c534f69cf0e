"""Invariants of the private methods: what they are without noise and clipping, closed forms, what enters an upload."""

import dataclasses
import math

import pytest
import torch
from fedcore import Simulation
from fedcore.algorithm import Client, Context
from fedcore.algorithms import ALGORITHMS, create
from fedcore.algorithms._private import PrivateAlgorithm
from fedcore.ops.laplacian import smooth, smooth_spans
from fedcore.ops.sparse import keep_largest, random_coordinates
from fedcore.privacy import PrivacyConfig, PrivateSimulation
from fedcore.spec import ParamSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from torch import nn
from torch.utils.data import TensorDataset

NAMES = [row.name for row in ALGORITHMS if "dp" in row.tags]
COHORTS = [[0, 1], [1, 3], [0, 2, 3], [1, 2]]
OPEN = PrivacyConfig(clip=math.inf, noise_multiplier=0.0)
SAME = {"rtol": 0, "atol": 1e-12}


def clients(seed=0, sizes=(8, 8, 8, 8)):
    draw = torch.Generator().manual_seed(seed)
    return [
        TensorDataset(
            torch.randn(size, 6, generator=draw, dtype=torch.float64), torch.randint(3, (size,), generator=draw)
        )
        for size in sizes
    ]


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


PLAN = {"batch_size": 4, "local_epochs": 2, "rounds": len(COHORTS), "engine": "serial"}


def private(name, privacy=OPEN, cohorts=((0, 1), (1, 3), (0, 2), (1, 2)), **options):
    """All cohorts of one size: then the fixed denominator is the number of clients that came."""
    return PrivateSimulation(
        network(), clients(), create(name, **options), privacy=privacy, cohorts=[list(c) for c in cohorts], **PLAN
    )


def plain(name, cohorts=((0, 1), (1, 3), (0, 2), (1, 2)), **options):
    return Simulation(network(), clients(), create(name, **options), cohorts=[list(c) for c in cohorts], **PLAN)


def same(ours, other):
    for _ in COHORTS:
        ours.round()
        other.round()
        torch.testing.assert_close(ours.flat, other.flat, **SAME)


# ------------------------------------------------------------------ degenerate cases (specification 8)


@pytest.mark.parametrize("gamma", [0.2, 0.5, 0.9])
def test_dp_fedpgn_without_noise_and_clip_is_fedcm(gamma):
    same(private("dp_fedpgn", gamma=gamma, weight_decay=0.0), plain("fedcm", beta=gamma, weight_decay=0.0))
    # FedCM scales decay with the gradient, DP-FedPGN does not.
    same(private("dp_fedpgn", gamma=gamma, weight_decay=0.01), plain("fedcm", beta=gamma, weight_decay=0.01 / gamma))


TWINS = [
    ("dp_fedpgn", {"gamma": 1.0}, "fedavg", {}),
    ("dp_fedavg", {}, "fedavg", {}),
    ("dp_fedsam", {"r": 0.1}, "fedsam", {"r": 0.1}),
    ("dp_fedsam", {"r": 0.0}, "fedavg", {}),
    ("dp_blur", {"a": 0.0}, "fedavg", {}),
    ("dp_blur", {"a": 0.4}, "fedavg", {}),  # nobody gets beyond an infinite radius
    ("fed_smp", {"p": 1.0, "scale": True}, "fedavg", {}),
    ("dp_scaffold", {}, "scaffold", {}),
    ("dp_scaffold", {"k": 7.0}, "scaffold", {}),
    ("dp_fedcm", {"beta": 0.3}, "fedcm", {"beta": 0.3}),
    ("dp_fedcm", {"beta": 1.0}, "fedavg", {}),
    ("dp_mofedsam", {}, "mofedsam", {}),
    ("dp_mofedsam", {"r": 0.0}, "fedcm", {}),
]


@pytest.mark.parametrize(("name", "options", "twin", "its"), TWINS)
def test_without_noise_and_clip_each_is_its_twin(name, options, twin, its):
    same(private(name, **options), plain(twin, **its))


@pytest.mark.parametrize(
    ("name", "options"),
    [("dp_fedpgn", {"gamma": 1.0}), ("dp_fedsam", {"r": 0.0}), ("dp_fedcm", {"beta": 1.0}), ("fed_smp", {"p": 1.0})],
)
def test_under_clip_and_noise_each_degenerate_case_is_dp_fedavg(name, options):
    # DP-FedPGN uploads descents, not moves: the same noise has the other sign there.
    sigma = 0.0 if name == "dp_fedpgn" else 0.5
    privacy = PrivacyConfig(clip=0.1, noise_multiplier=sigma, deterministic_noise_for_tests=True)
    same(private(name, privacy, **options), private("dp_fedavg", privacy))


def test_closed_form_of_dp_fedpgn():
    """c <- (1 - gamma) c + h / (K eta) and theta <- theta - K eta c, with the eta of the round (specification 3.4)."""
    spec = ParamSpec.from_module(nn.Linear(4, 3).double())
    algorithm = create("dp_fedpgn", gamma=0.3, smoothing=0.5).bind(spec)
    draw = torch.Generator().manual_seed(0)
    theta, c = (torch.randn(15, generator=draw, dtype=torch.float64) for _ in range(2))
    for round, lr in enumerate((0.1, 0.09, 0.02)):
        release = torch.randn(15, generator=draw, dtype=torch.float64)
        ctx = Context(round, 3, 10, 2, lr, lr, 7, 7)
        found, server = algorithm.server_step({"c": c}, theta, {"residual": release}, ctx)
        h = smooth_spans(release, [(item.start, item.stop) for item in spec], 0.5)
        expected = 0.7 * c + h / (7 * lr)
        torch.testing.assert_close(server["c"], expected, **SAME)
        torch.testing.assert_close(found, theta - 7 * lr * expected, **SAME)
        theta, c = found, server["c"]


def test_order_in_which_clients_are_named_changes_nothing():
    privacy = PrivacyConfig(clip=0.1, noise_multiplier=0.5, deterministic_noise_for_tests=True)
    forward = private("dp_fedpgn", privacy, COHORTS)
    backward = private("dp_fedpgn", privacy, [list(reversed(cohort)) for cohort in COHORTS])
    same(forward, backward)
    assert torch.equal(forward.server_state["c"], backward.server_state["c"])


# ------------------------------------------------------------------ what a client uploads


def upload_of(name, delta, **options):
    """The upload of a client that moved by ``delta``, and the algorithm."""
    spec = ParamSpec.from_module(nn.Linear(4, 3).double())
    algorithm = create(name, **options).with_clip(1.0).bind(spec)
    params = torch.zeros(15, dtype=torch.float64)
    ctx = Context(0, 3, 10, 2, 0.1, 0.1, 5, 5)
    state = {key: value.double() for key, value in algorithm.client_init(ctx, Client(0, 8, 5)).items()}
    server = algorithm.server_init(params)
    received, message = algorithm.broadcast(server, params, ctx, Client(0, 8, 5))
    start, local = algorithm.local_init(received, message, state, ctx, torch.zeros_like)
    return algorithm.local_finish(start, start + delta, message, state, local, ctx)[0], algorithm, ctx


@pytest.mark.parametrize("name", NAMES)
def test_the_empty_upload_has_names_and_shapes_of_a_real_one(name):
    found, algorithm, ctx = upload_of(name, torch.ones(15, dtype=torch.float64))
    empty = algorithm.empty_upload(torch.zeros(15, dtype=torch.float64), ctx)
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in empty.items()}
    assert not any(value.any() for value in empty.values())


@pytest.mark.parametrize("name", NAMES)
def test_what_all_private_methods_say_of_themselves(name):
    kind = ALGORITHMS.load(name)
    assert issubclass(kind, PrivateAlgorithm)
    assert (kind.private, kind.reduction, kind.adapters) == (True, "sum", False)
    assert "dp" in ALGORITHMS.info(name).tags


@pytest.mark.parametrize("name", NAMES)
def test_no_private_method_trains_without_its_mechanism(name):
    with pytest.raises(UserError, match="privac"):
        Simulation(network(), clients(), create(name).with_clip(1.0), **PLAN)


def test_every_method_counts_steps_by_the_public_number():
    """A context whose own K is wrong gives the same upload and the same step: nobody reads it."""
    delta = torch.linspace(-1, 1, 15, dtype=torch.float64)
    for name in NAMES:
        found, algorithm, ctx = upload_of(name, delta)
        lying = dataclasses.replace(ctx, steps=3)
        params = torch.zeros(15, dtype=torch.float64)
        server = {key: torch.ones_like(value) for key, value in algorithm.server_init(params).items()}
        state = {key: value.double() for key, value in algorithm.client_init(ctx, Client(0, 8, 5)).items()}
        _, message = algorithm.broadcast(server, params, ctx, Client(0, 8, 5))
        uploads, steps = [], []
        for each in (ctx, lying):
            start, local = algorithm.local_init(params, message, state, each, torch.zeros_like)
            uploads.append(algorithm.local_finish(start, start + delta, message, state, local, each)[0])
            steps.append(algorithm.server_step(server, params, found, each))
        for key in uploads[0]:
            assert torch.equal(uploads[0][key], uploads[1][key]), name
        assert torch.equal(steps[0][0], steps[1][0]), name
        for key in steps[0][1]:
            assert torch.equal(steps[0][1][key], steps[1][1][key]), name


def test_blur_pulls_back_only_outside_the_ball():
    spec = ParamSpec.from_module(nn.Linear(4, 3).double())
    algorithm = create("dp_blur", weight_decay=0.0, a=0.5).with_clip(2.0).bind(spec)
    assert algorithm.radius == 2.0
    anchor = torch.zeros(15, dtype=torch.float64)
    _, local = algorithm.local_init(anchor, {}, {}, None, None)

    def still(params, batch, *, rng, update_buffers=True):
        return torch.zeros_like(params), params.new_zeros(())

    step = type("Step", (), {"lr": 0.1, "rng": 0})()
    near, far = (torch.zeros(15, dtype=torch.float64) for _ in range(2))
    near[0], far[0] = 1.9, 4.0
    both = torch.stack([near, far])
    moved, _ = algorithm.local_step(both.clone(), still, None, local, step)
    assert torch.equal(moved[0], near)
    torch.testing.assert_close(moved[1], far * (1 - 0.1 * 0.5), **SAME)
    with pytest.raises(UserError, match="radius"):
        create("dp_blur").bind(spec)


def test_a_clip_that_is_not_scaled_with_gamma_is_warned_of():
    algorithm = create("dp_fedpgn", gamma=0.2)
    said = algorithm.clip_warning(1.0, steps=10, lr=0.1)
    assert "not scaled with gamma=0.2" in said
    assert "5 times" in said
    assert "0.2" in said.rpartition("gamma K eta")[2]
    assert not algorithm.clip_warning(0.15, steps=10, lr=0.1)
    assert not create("dp_fedpgn", gamma=1.0).clip_warning(9.0, steps=10, lr=0.1)
    assert not create("dp_fedavg").clip_warning(9.0, steps=10, lr=0.1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dp_fedpgn", {"gamma": 0.0}),
        ("dp_fedpgn", {"r": -1.0}),
        ("dp_fedpgn", {"smoothing": math.nan}),
        ("dp_fedavg", {"server_momentum": 1.0}),
        ("dp_fedavg", {"smoothing": -0.1}),
        ("dp_fedsam", {"topk": 0.0}),
        ("fed_smp", {"p": 1.5}),
        ("dp_blur", {"a": -1.0}),
        ("dp_blur", {"radius": 0.0}),
        ("dp_scaffold", {"k": 0.0}),
        ("dp_fedcm", {"beta": 0.0}),
    ],
)
def test_bad_options_are_named(name, options):
    (option,) = options
    with pytest.raises(UserError, match=f"{option}="):
        create(name, **options)


# ------------------------------------------------------------------ smoothing and sparse vectors


vectors = st.integers(1, 40).flatmap(
    lambda size: st.lists(st.floats(-1e3, 1e3, allow_nan=False), min_size=size, max_size=size)
)


@settings(deadline=None, max_examples=40)
@given(vectors, st.floats(0, 50))
def test_smoothing_keeps_the_mean_and_never_adds_length(values, strength):
    vector = torch.tensor(values, dtype=torch.float64)
    found = smooth(vector, strength)
    assert float(found.norm()) <= float(vector.norm()) * (1 + 1e-9) + 1e-12
    assert float(found.mean()) == pytest.approx(float(vector.mean()), abs=1e-9)
    if len(values) > 1:
        back = found - strength * (found.roll(1) + found.roll(-1) - 2 * found)
        torch.testing.assert_close(back, vector, rtol=1e-9, atol=1e-8)


def test_no_smoothing_is_the_identity_and_tensors_are_smoothed_apart():
    vector = torch.randn(3, 15, generator=torch.Generator().manual_seed(0))
    assert smooth(vector, 0.0) is vector
    spans = [(0, 12), (12, 15)]
    found = smooth_spans(vector, spans, 1.5)
    for row in range(3):
        for start, stop in spans:
            torch.testing.assert_close(found[row, start:stop], smooth(vector[row, start:stop], 1.5))
    assert smooth(vector.half(), 1.0).dtype == torch.float16


@settings(deadline=None, max_examples=40)
@given(st.floats(0.01, 1.0), st.integers(0, 1000))
def test_the_largest_entries_stay(share, seed):
    vector = torch.randn(2, 15, generator=torch.Generator().manual_seed(seed))
    found = keep_largest(vector, [(0, 12), (12, 15)], share)
    for start, stop in ((0, 12), (12, 15)):
        for row in range(2):
            part, kept = vector[row, start:stop], found[row, start:stop]
            count = math.ceil(share * (stop - start))
            assert int((kept != 0).sum()) == count
            assert torch.equal(kept[kept != 0], part[kept != 0])
            dropped = part[kept == 0].abs()
            assert not len(dropped) or float(dropped.max()) <= float(kept[kept != 0].abs().min())


def test_coordinates_depend_on_the_round_alone():
    first = random_coordinates(1000, 400, 0, 3)
    random_coordinates.cache_clear()
    again = random_coordinates(1000, 400, 0, 3)
    assert torch.equal(first, again)
    assert len(first.unique()) == 400
    assert not torch.equal(first, random_coordinates(1000, 400, 0, 4))
    assert not torch.equal(first, random_coordinates(1000, 400, 1, 3))


def test_fed_smp_moves_the_coordinates_of_the_round_only():
    sim = private("fed_smp", PrivacyConfig(clip=0.1, noise_multiplier=1.0), p=0.25)
    before = sim.flat.clone()
    sim.round()
    places = sim.algorithm.coordinates(0, len(before), before.device)
    rest = torch.ones(len(before), dtype=torch.bool)
    rest[places] = False
    assert torch.equal(sim.flat[rest], before[rest])
    assert bool((sim.flat[places] != before[places]).all())
    assert sim.ledger.events[0].numbers == math.ceil(0.25 * len(before))
