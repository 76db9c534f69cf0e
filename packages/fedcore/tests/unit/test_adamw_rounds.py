"""What FedAdamW and its rivals promise over rounds: degenerate cases, heavy ball, direction, bytes, resume, presets."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fedcore import Simulation
from fedcore.algorithms import create
from fedcore.algorithms.fedadamw import FedAdamW
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from torch import nn
from torch.utils.data import TensorDataset

_spec = importlib.util.spec_from_file_location("fedcore_adamw_drive", Path(__file__).with_name("_adamw_drive.py"))
drive = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(drive)

COHORTS = [[0, 3], [1, 2], [0, 2, 3], [1]]


def simulation(name, cohorts=COHORTS, engine="serial", **options):
    """Four clients of unequal sizes, unequal K, a small network in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    draw = torch.Generator().manual_seed(1)
    data = [
        TensorDataset(
            torch.randn(size, 5, generator=draw, dtype=torch.float64) + i,
            torch.randint(0, 3, (size,), generator=draw),
        )
        for i, size in enumerate((5, 12, 8, 3))
    ]
    algorithm = create(name, **{"lr": 0.02} | options)
    return Simulation(model, data, algorithm, batch_size=4, local_epochs=2, cohorts=cohorts, rounds=4, engine=engine)


def flats(name, cohorts=COHORTS, rounds=None, **options):
    sim = simulation(name, cohorts, **options)
    found = []
    for _ in range(rounds or len(cohorts)):
        sim.round()
        found.append(sim.flat.clone())
    return torch.stack(found)


# ---------------------------------------------------------------------- degenerate cases, bit for bit


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedadamw", {}),
        ("fedadamw", {"v_blocks": "full", "alpha": 0.9}),
        ("fedadamw", {"bias": "code"}),
        ("agg_v", {}),
        ("agg_vm", {}),
        ("scaffold_adamw", {}),
    ],
)
def test_first_round_is_local_adamw(name, options):
    first, *later = flats(name, **options)
    expected = flats("local_adamw")
    torch.testing.assert_close(first, expected[0], rtol=0, atol=1e-14)
    assert torch.equal(first, expected[0]) or name == "agg_vm"  # whose m is kept undivided
    assert not torch.allclose(later[0], expected[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "same", "others"),
    [
        ("fedadamw", {"alpha": 0.0, "v_blocks": "none"}, "local_adamw", {}),
        ("fedadamw", {"alpha": 0.0, "v_blocks": "full"}, "agg_v", {}),
        ("fedcm_adamw", {"beta": 1.0}, "local_adamw", {}),
        ("local_adam", {"weight_decay": 0.0}, "local_adamw", {"weight_decay": 0.0}),
    ],
)
def test_degenerate_cases(name, options, same, others):
    assert torch.equal(flats(name, **options), flats(same, **others))


def test_scaffold_with_one_client_is_local_adamw():
    cohorts = [[0]] * 4
    sims = [simulation(name, cohorts) for name in ("scaffold_adamw", "local_adamw")]
    for sim in sims:
        sim.federation.data[:] = sim.federation.data[:1]
        for _ in cohorts:
            sim.round()
    torch.testing.assert_close(sims[0].flat, sims[1].flat, rtol=0, atol=1e-9)


# ---------------------------------------------------------------------- direction


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    st.booleans(),
    st.lists(st.floats(1e-3, 0.3), min_size=2, max_size=4),
    st.sampled_from([[4], [4, 4], [2, 5, 3]]),
)
def test_mean_moves_are_a_heavy_ball(seed, alpha, mix, lrs, steps):
    """Without decay: ``Delta_r = L_r + alpha (K_r eta_r) / (K_{r-1} eta_{r-1}) Delta_{r-1}``, L the mean Adam move."""
    moves = []

    class Recording(FedAdamW):
        def advance(self, params, grad, local, **options):
            before = params.clone()
            super().advance(params, grad, local, **options)
            moves[-1] += (params - before) / len(steps)

    algorithm = Recording(alpha=alpha, mix=mix, weight_decay=0.0, v_blocks="tensor")
    grad_fn = drive.Recorder(seed)
    moves.append(torch.zeros_like(grad_fn.params))
    last, driven = torch.zeros_like(grad_fn.params), drive.rounds(algorithm, grad_fn, lrs, steps, range(len(steps)))
    for r, (_, mean, _, _) in enumerate(driven):
        ratio = lrs[r] / lrs[r - 1] if r else 1.0
        torch.testing.assert_close(mean["delta"], moves[-1] + alpha * ratio * last, rtol=1e-11, atol=1e-13)
        last = mean["delta"]
        moves.append(torch.zeros_like(last))
    assert (moves[0] != 0).any()


@pytest.mark.parametrize(("name", "weight"), [("fedadamw", 0.5), ("fedlada", 0.9)])
def test_without_gradient_a_step_is_the_last_move_at_the_new_rate(name, weight):
    """The eta ratio: ``K`` steps at rate ``eta'`` repeat ``weight * eta' / eta`` of the move made at ``eta``."""
    grad_fn = drive.Recorder(seed=2)
    driven = drive.rounds(create(name, weight_decay=0.0, lr=0.1), grad_fn, [0.1, 0.03, 0.3], [4])
    _, first, _, server = next(driven)
    torch.testing.assert_close(server["direction"], first["delta"] / -(4 * 0.1), rtol=1e-14, atol=0)
    grad_fn.curvature.zero_()
    for ratio in (0.03 / 0.1, 0.3 / 0.03):
        _, move, _, _ = next(driven)
        torch.testing.assert_close(move["delta"], weight * ratio * first["delta"], rtol=1e-11, atol=1e-15)
        first = move


def test_a_constant_adam_move_doubles_at_alpha_one_half():
    """The steady state of the heavy ball is 1 / (1 - alpha)."""
    grad_fn = drive.Recorder(seed=3)
    grad_fn.curvature.zero_()
    constant = torch.linspace(-1, 1, grad_fn.spec.numel, dtype=torch.float64)

    class Constant(FedAdamW):
        def advance(self, params, grad, local, **options):
            params.sub_(constant, alpha=options["rate"])

    *_, (_, last, _, _) = drive.rounds(Constant(weight_decay=0.0), grad_fn, [0.1] * 40, [4])
    torch.testing.assert_close(last["delta"], 2 * -4 * 0.1 * constant, rtol=1e-10, atol=1e-14)


def test_all_starts_at_zero():
    algorithm = create("fedadamw").bind(drive.Recorder().spec)
    server = algorithm.server_init(torch.ones(15))
    assert {name: float(value.abs().sum()) for name, value in server.items()} == {"v": 0, "direction": 0, "t": 0}
    assert {name: value.numel() for name, value in server.items()} == {"v": 4, "direction": 15, "t": 1}


# ---------------------------------------------------------------------- v and t


@pytest.mark.parametrize("v_blocks", ["hessian", "tensor", "full"])
def test_v_is_the_mean_of_the_clients_and_never_negative(v_blocks):
    """Of one client its own; blocks of the mean are the mean of blocks."""
    algorithm = create("fedadamw", v_blocks=v_blocks)
    grad_fn = drive.Recorder(seed=4)
    for _, mean, _, server in drive.rounds(algorithm, grad_fn, [0.1] * 3, [2, 5, 3], range(3)):
        assert torch.equal(server["v"], mean["v"])
        assert (server["v"] >= 0).all()
    bound = algorithm.bind(grad_fn.spec)
    vs = torch.rand(3, 15, dtype=torch.float64)
    torch.testing.assert_close(bound.pack(vs.mean(dim=0)), bound.pack(vs).mean(dim=0), rtol=1e-14, atol=0)


def test_t_counts_the_longest_client_of_each_cohort():
    """K is 4, 6, 4, 2."""
    sim = simulation("fedadamw")
    seen = []
    for _ in COHORTS:
        sim.round()
        seen.append(int(sim.server_state["t"]))
    assert seen == [4, 10, 14, 20]


def test_bytes_are_the_parameters_the_direction_and_the_block_means():
    """8 bytes a number; t is one of the numbers sent down."""
    sim = simulation("fedadamw")
    blocks, size = len(sim.algorithm.blocks), sim.flat.numel()
    assert (blocks, size) == (6 + 1 + 3 + 1, 57)
    row = sim.round()
    assert row["comm/up_bytes"] == 2 * 8 * (size + blocks)
    assert row["comm/down_bytes"] == 2 * 8 * (2 * size + blocks + 1)
    for name, down, up in (("local_adamw", 1, 1), ("agg_vm", 3, 3), ("fedcm_adamw", 2, 1), ("scaffold_adamw", 2, 2)):
        row = simulation(name).round()
        assert row["comm/up_bytes"] == 2 * 8 * up * size
        assert row["comm/down_bytes"] - 2 * 8 * down * size in (0, 2 * 8)


@pytest.mark.parametrize("name", ["fedadamw", "agg_vm", "fedlada", "fedcm_adamw"])
def test_resume_needs_no_file_of_any_client(name):
    whole, first = simulation(name), simulation(name)
    for _ in range(2):
        first.round()
    state = first.state_dict()
    assert not state["clients"]
    second = simulation(name)
    second.load_state_dict(state)
    for _ in range(2):
        second.round()
    for _ in range(4):
        whole.round()
    assert torch.equal(second.flat, whole.flat)
    assert all(torch.equal(second.server_state[key], value) for key, value in whole.server_state.items())


# ---------------------------------------------------------------------- options


def test_presets_set_their_options_and_refuse_others():
    preset = create("fedadamw", variant="code2025-07", alpha=0.9)
    assert (preset.mix, preset.v_blocks, preset.bias, preset.alpha) == (True, "tensor", "code", 0.9)
    assert replace(preset, lr=0.5).v_blocks == "tensor"
    assert create("fedadamw", variant="code2025-11") == create(
        "fedadamw", variant="code2025-11", v_blocks="full", bias="code"
    )
    with pytest.raises(UserError, match=r"v_blocks=full with variant=code2025-07, which sets tensor"):
        create("fedadamw", variant="code2025-07", v_blocks="full")
    with pytest.raises(UserError, match=r"variant='x'; expected paper, code2025-07, code2025-11"):
        create("fedadamw", variant="x")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("local_adamw", {"b1": 1.0}, "b1=1.0; expected 0 <= b1 < 1"),
        ("local_adamw", {"b2": -0.1}, "b2=-0.1; expected 0 <= b2 < 1"),
        ("local_adamw", {"eps": 0.0}, "eps=0.0; expected more than 0"),
        ("fedadamw", {"alpha": 1.0}, "alpha=1.0; expected 0 <= alpha < 1"),
        ("fedadamw", {"alpha": float("nan")}, "alpha=nan"),
        ("fedadamw", {"v_blocks": "rows"}, "v_blocks=rows; expected hessian, tensor, full or none"),
        ("fedadamw", {"bias": "k"}, "bias=k; expected local or code"),
        ("fedlada", {"gamma": 1.0}, "gamma=1.0; expected 0 <= gamma < 1"),
        ("fedcm_adamw", {"beta": 0.0}, "beta=0.0; expected 0 < beta <= 1"),
        ("agg_m", {"cap": 0.0}, "cap=0.0; expected more than 0"),
    ],
)
def test_options_out_of_range_are_named(name, options, message):
    with pytest.raises(UserError) as caught:
        create(name, **options)
    assert str(caught.value).startswith(message)


def test_defaults_are_those_of_the_paper():
    found = create("fedadamw")
    assert (found.b1, found.b2, found.eps, found.alpha, found.weight_decay) == (0.9, 0.999, 1e-8, 0.5, 0.01)
    assert (found.v_blocks, found.mix, found.bias) == ("hessian", False, "local")
    assert (found.lr, found.round_lr, found.clip_grad) == (3e-4, "cosine", 10.0)
    assert (create("fedlada").weight_decay, create("fedlada").gamma) == (1e-3, 0.9)
    assert create("fedcm_adamw").beta == 0.1
