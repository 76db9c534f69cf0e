"""Rounds of the methods on adapters: folding, uploads that do not fit, bytes, resume."""

from __future__ import annotations

import copy
import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from fedcore import RoundError
from fedcore.algorithms import create
from fedcore.lora import inject
from polymodal.errors import UserError
from polymodal.nested import difference
from torch import nn


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_lora{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


drive = _load("_lora_drive")
NAMES, LAYER, HEAD, D, K = drive.NAMES, drive.LAYER, drive.HEAD, drive.D, drive.K
engines, base, adapted, simulate, weight, evaluated = (
    drive.engines,
    drive.base,
    drive.adapted,
    drive.simulate,
    drive.weight,
    drive.evaluated,
)


# ------------------------------------------------------------------ folding


def effective(sim, rank):
    """Weight at which clients of a rank start the next round."""
    algorithm, layout = sim.algorithm, sim.algorithm.layouts[rank]
    ctx, client = drive.context(sim), drive.client(sim, rank)
    shift = algorithm.base_shift(sim.server_state, sim.flat, ctx, client)
    a, b = layout.layers[0].factors(algorithm.sent(sim.flat, rank, sim.done))
    frozen = adapted(algorithm.default_init)(rank).get_submodule(LAYER).base_layer.weight.detach()
    return frozen + shift.get(f"{LAYER}.base_layer.weight", 0.0) + 2.0 * b @ a


@pytest.mark.parametrize(
    ("name", "options"), [("ilora", {"residual": "fold"}), ("flora", {}), ("flora", {"restart": "start"})]
)
def test_all_ranks_start_a_round_from_the_same_weight(name, options):
    sim = simulate(create(name, lr=0.02, **options))
    for _ in range(3):
        sim.round()
        expected = evaluated(sim)
        for rank in (1, 2, 3):
            torch.testing.assert_close(effective(sim, rank), expected, rtol=0, atol=1e-12)


def test_dropping_does_not():
    sim = simulate(create("ilora", lr=0.02))
    sim.round()
    assert float((effective(sim, 1) - effective(sim, 3)).abs().max()) > 1e-3


def test_fold_is_floras_merged_weight():
    one = simulate(create("ilora", residual="fold", cv=False), model=adapted())
    two = simulate(create("flora"), model=adapted())
    one.round(), two.round()
    torch.testing.assert_close(evaluated(one), evaluated(two), rtol=0, atol=1e-12)
    merged = two.server_state["merged.0"] + base().get_submodule(LAYER).weight.detach()
    torch.testing.assert_close(evaluated(two), merged, rtol=0, atol=1e-12)


def test_fold_with_enough_rank_is_drop():
    """Nothing is cut at full rank, and equal ranks share one frozen weight."""
    sims = [simulate(create("ilora", residual=kind), (5, 5, 5), model=adapted("qr")) for kind in ("drop", "fold")]
    for _ in range(3):
        for sim in sims:
            sim.round()
        torch.testing.assert_close(evaluated(sims[0]), evaluated(sims[1]), rtol=0, atol=1e-10)


def test_what_travels_makes_the_exact_average():
    sim = simulate(create("ilora", residual="fold", cv=False))
    uploads = [(k, 0.25, drive.upload(sim, rank, 1.0 + k)) for k, rank in enumerate(sim.ranks)]
    flat, server = sim.algorithm.server_step(sim.server_state, sim.flat, uploads, drive.context(sim))
    exact = sum(0.25 * drive.product(upload) for _, _, upload in uploads)
    ctx = drive.context(sim, 1)
    for rank in (1, 2, 3):
        vector, message = sim.algorithm.broadcast(server, flat, ctx, drive.client(sim, rank))
        a, b = sim.algorithm.layouts[rank].layers[0].factors(vector)
        whole = torch.cat([b, message["news_b.0"]], 1) @ torch.cat([a, message["news_a.0"]])
        torch.testing.assert_close(whole, exact, rtol=0, atol=1e-12)
        assert len(a) + len(message["news_a.0"]) == min(sum(sim.ranks), D, K)


def test_a_client_that_was_away_is_sent_the_whole_change():
    for name, options in (("ilora", {"residual": "fold", "cv": False}), ("flora", {}), ("fedex_lora", {})):
        ranks = (2, 2, 2)
        sim = simulate(create(name, **options), ranks, [[0, 1]] * 4)
        sim.round()
        ctx = drive.context(sim)
        away = sim.algorithm.broadcast(sim.server_state, sim.flat, ctx, drive.client(sim, 2, 2))[1]
        here = sim.algorithm.broadcast(sim.server_state, sim.flat, ctx, drive.client(sim, 2, 1))[1]
        assert {key: tuple(value.shape) for key, value in away.items()} == {"merged.0": (D, K)}
        assert set(here) == {"news_a.0", "news_b.0"}


def test_frozen_weights_stored_the_other_way_round():
    class Conv1D(nn.Module):
        """GPT-2's linear layer."""

        def __init__(self, linear):
            super().__init__()
            self.nf = linear.out_features
            self.weight = nn.Parameter(linear.weight.detach().T.contiguous())
            self.bias = nn.Parameter(linear.bias.detach().clone())

        def forward(self, x):
            return x @ self.weight + self.bias

    def turned(rank):
        net = base()
        net[0] = Conv1D(net[0])
        return inject(net, rank, targets=(LAYER,), head=(HEAD,), init="qr_scaled")

    straight = simulate(create("ilora", residual="fold"))
    other = simulate(create("ilora", residual="fold"), model=turned)
    for _ in range(3):
        straight.round(), other.round()
    layer = other.model.get_submodule(LAYER)
    found = layer.base_layer.weight.detach().T + 2.0 * layer.factors[1].detach() @ layer.factors[0].detach()
    torch.testing.assert_close(found, evaluated(straight), rtol=0, atol=1e-11)


@pytest.mark.parametrize("init", ["qr_scaled", "qr"])
def test_small_starts_keep_the_bias_of_unequal_frozen_weights_small(init):
    """The first aggregate of untrained clients differs from the base by ``delta_max - sum_k p_k delta_k``."""
    rms, scaling = 1e-4, 2.0
    sim = simulate(create("ilora", lr=1e-13), model=adapted(init, scaling, init_rms=rms))
    sim.round()
    bias = float((evaluated(sim) - base().get_submodule(LAYER).weight.detach()).norm())
    tau = scaling * rms * (D * K) ** 0.5
    assert bias <= 2 * tau if init == "qr_scaled" else bias > 100 * tau


# ------------------------------------------------------------------ uploads and rounds


@pytest.mark.parametrize("options", [{}, {"residual": "fold"}, {"decomposition": "svd"}])
def test_signs_of_directions_do_not_matter(options):
    sim = simulate(create("ilora", cv=False, **options))
    found = []
    for sign in (1.0, -1.0):
        uploads = [(k, 0.25, drive.upload(sim, rank, 1.0 + k)) for k, rank in enumerate(sim.ranks)]
        uploads[1][2][f"{LAYER}.lora_A.default.weight"][1] *= sign
        uploads[1][2][f"{LAYER}.lora_B.default.weight"][:, 1] *= sign
        found.append(sim.algorithm.server_step(sim.server_state, sim.flat, uploads, drive.context(sim))[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_uploads_that_do_not_fit_are_left_out_with_a_warning(name, caplog):
    ranks = (2, 2, 2, 2)
    sim = simulate(create(name, **({"cv": False} if name == "ilora" else {})), ranks)
    good = [(0, 0.1, drive.upload(sim, 2, 1.0)), (2, 0.3, drive.upload(sim, 2, 2.0))]
    wrong, broken = drive.upload(sim, 2, 3.0), drive.upload(sim, 2, 4.0)
    wrong[f"{HEAD}.weight"] = wrong[f"{HEAD}.weight"][:, :-1]
    broken[f"{HEAD}.bias"][0] = torch.nan
    server, ctx = sim.server_state, drive.context(sim)
    with caplog.at_level(logging.WARNING):
        flat, state = sim.algorithm.server_step(server, sim.flat, [*good, (1, 0.5, wrong), (3, 0.1, broken)], ctx)
    assert [record.args[1] for record in caplog.records] == [1, 3]
    renormalised = [(0, 0.25, good[0][2]), (2, 0.75, good[1][2])]
    expected, also = sim.algorithm.server_step(server, sim.flat, renormalised, ctx)
    torch.testing.assert_close(flat, expected, rtol=0, atol=1e-12)
    assert set(state) == set(also)
    with pytest.raises(RoundError, match="no upload can be used"):
        sim.algorithm.server_step(server, sim.flat, [(1, 0.5, wrong), (3, 0.5, broken)], ctx)


def test_an_upload_without_its_variate_is_refused():
    sim = simulate(create("ilora"))
    with pytest.raises(UserError, match="cv"):
        sim.algorithm.server_step(sim.server_state, sim.flat, [(0, 1.0, drive.upload(sim, 1, 1.0))], drive.context(sim))


@pytest.mark.parametrize("name", ["fedit", "hetlora", "lora_fair", "flexlora", "ilora"])
def test_rows_of_absent_clients_can_still_be_trained(name):
    """A cohort of small ranks must not leave dead rows, zero in both factors, to the larger ones."""
    sim = simulate(create(name), (1, 3), [[0], [0], [1]])
    sim.round(), sim.round()
    before = {n: v.clone() for n, v in sim.params.items()}
    sim.round()
    for side, dim in (("A", 1), ("B", 0)):
        moved = (
            sim.params[f"{LAYER}.lora_{side}.default.weight"] != before[f"{LAYER}.lora_{side}.default.weight"]
        ).any(dim)
        assert bool(moved.all()), side


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ilora", {"residual": "fold", "cv_transport": True}),
        ("ilora", {"decomposition": "qr_pivoted", "control_batches": 1, "optimizer": "sgd"}),
        ("hetlora", {"prune": 0.5, "gamma": 0.5}),
        ("flora", {"restart": "start"}),
    ],
)
def test_resume_and_pool_of_further_options_are_exact(name, options):
    def fresh(engine="serial"):
        algorithm = create(name, lr=0.05, **options)
        return engines.simulate(
            algorithm, adapted(algorithm.default_init), ranks=engines.RANKS, engine=engine, data=DATA
        )

    whole, first, pool = fresh(), fresh(), fresh("pool")
    engines.run(whole), engines.run(first, 2), engines.run(pool)
    second = fresh()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    engines.run(second, 2)
    assert not difference(engines.state(whole), engines.state(second))
    assert not difference(engines.state(whole), engines.state(pool))
    assert torch.equal(evaluated(whole), evaluated(second))


DATA = engines.clients(dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "options", "up", "down"),
    [
        ("lora_head", {}, [0, 0], [0, 0]),
        ("fedit", {}, [1, 1], [1, 1]),
        ("ffa_lora", {}, [D / (D + K)] * 2, [D / (D + K)] * 2),
        ("rolora", {}, [D / (D + K), K / (D + K)], [1, 1]),
        ("flexlora", {}, [1, 1], [1, 1]),
        ("flora", {}, [1, 1], [0, 2]),
        ("fedex_lora", {}, [1, 1], [1, 3]),
        ("ilora", {"cv": False}, [1, 1], [1, 1]),
        ("ilora", {"cv": True}, [2, 2], [2, 2]),
        ("ilora", {"cv": False, "residual": "fold"}, [1, 1], [1, 2]),
    ],
)
def test_bytes(name, options, up, down):
    """In units of the factors of two clients of rank 2; r_tot is 4. The head travels whole, twice with variates."""
    sim = simulate(create(name, **options), (2, 2))
    factors, head = 2 * 2 * (D + K), 2 * (3 * D + 3)
    times = 2 if options.get("cv") else 1
    for expected_up, expected_down in zip(up, down, strict=True):
        row = sim.round()
        assert row["comm/up_bytes"] == 8 * round(expected_up * factors + times * head)
        assert row["comm/down_bytes"] == 8 * round(expected_down * factors + times * head)
