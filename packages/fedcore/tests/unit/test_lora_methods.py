"""Invariants of the methods on adapters: local steps, exactness, limits, control variates, bad options."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from fedcore import Simulation
from fedcore.algorithms import ALGORITHMS, create
from fedcore.lora import inject
from polymodal.errors import UserError
from polymodal.nested import difference
from torch import nn
from torch.utils.data import TensorDataset


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_lora{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


drive = _load("_lora_drive")
NAMES, LAYER, HEAD = drive.NAMES, drive.LAYER, drive.HEAD
toy, engines, base, adapted, simulate, weight, evaluated, alone = (
    drive.toy,
    drive.engines,
    drive.base,
    drive.adapted,
    drive.simulate,
    drive.weight,
    drive.evaluated,
    drive.alone,
)


# ------------------------------------------------------------------ local training


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        ({"lr": 0.01, "weight_decay": 0.1, "b1": 0.8, "b2": 0.95, "eps": 1e-6}, torch.optim.AdamW),
        ({"lr": 0.01}, torch.optim.AdamW),
        ({"lr": 0.05, "optimizer": "sgd", "weight_decay": 0.1, "momentum": 0.7}, torch.optim.SGD),
    ],
)
@pytest.mark.parametrize("name", ["fedit", "ilora"])
def test_one_client_is_torchs_optimizer(name, options, optimizer):
    algorithm = create(name, **options)
    sim = simulate(algorithm, (3,), model=adapted(), data=toy.clients(dtype=torch.float64)[1:2], shuffle=False)
    x, y = toy.clients(dtype=torch.float64)[1].tensors
    twin = adapted()(3)
    known = {"lr": options["lr"], "weight_decay": options.get("weight_decay", 0.0)}
    if optimizer is torch.optim.AdamW:
        known |= {"betas": (algorithm.b1, algorithm.b2), "eps": algorithm.eps}
    else:
        known["momentum"] = algorithm.momentum
    trained = optimizer([p for p in twin.parameters() if p.requires_grad], **known)
    for i in [*range(0, 12, 4)] * 2:
        trained.zero_grad()
        nn.functional.cross_entropy(twin(x[i : i + 4]), y[i : i + 4]).backward()
        trained.step()
    sim.round()
    torch.testing.assert_close(evaluated(sim), weight(twin), rtol=0, atol=1e-12)
    if name == "fedit":
        for key, value in sim.params.items():
            torch.testing.assert_close(value, twin.get_parameter(key).detach(), rtol=0, atol=1e-12)


def test_factors_that_stand_still_do_not_decay_nor_count_for_the_clip():
    for name, still in (("ffa_lora", "lora_A"), ("rolora", "lora_A"), ("lora_head", "lora_")):
        sim = simulate(create(name, weight_decay=0.5, clip_grad=0.1), (2, 2))
        before = {n: v.clone() for n, v in sim.params.items()}
        sim.round()
        assert {n for n, v in sim.params.items() if torch.equal(v, before[n])} == {n for n in before if still in n}


# ------------------------------------------------------------------ exactness


@pytest.mark.parametrize(
    ("name", "options", "ranks"),
    [
        ("ffa_lora", {}, (1, 3, 2)),
        ("rolora", {}, (2, 2, 2)),
        ("flora", {}, (1, 3, 2)),
        ("flora", {"restart": "start"}, (1, 3, 2)),
        ("fedex_lora", {}, (2, 2, 2)),
        ("ilora", {"residual": "fold"}, (1, 3, 2)),
        ("ilora", {"residual": "fold", "decomposition": "svd"}, (1, 3, 2)),
        ("ilora", {}, (5, 5, 5)),
        ("flexlora", {}, (5, 5, 5)),
    ],
)
def test_exact_methods_give_the_average_of_the_clients_weights(name, options, ranks):
    """Also from QR starts whose frozen weights differ; for FFA-LoRA as long as all share one A."""
    start = "kaiming" if name == "ffa_lora" else "qr"
    shares = [7 / 24, 12 / 24, 5 / 24]
    expected = []
    for client in range(3):
        one = simulate(create(name, **options), ranks, [[client]] * 4, adapted(start))
        one.round()
        mine = one if one.algorithm.shifts_base else None
        if mine is None:  # its own frozen weight under its own factors
            spec = one.algorithm.layouts[ranks[client]]
            vector = one.algorithm.own.cut(one.flat, spec)
            (a, b), net = spec.layers[0].factors(vector), adapted(start)(ranks[client])
            expected.append(net.get_submodule(LAYER).base_layer.weight.detach() + 2.0 * b @ a)
        else:
            expected.append(evaluated(one))
    sim = simulate(create(name, **options), ranks, [[0, 1, 2]] * 4, adapted(start), weighting="samples")
    sim.round()
    exact = sum(p * w for p, w in zip(shares, expected, strict=True))
    torch.testing.assert_close(evaluated(sim), exact, rtol=0, atol=1e-11)


def test_averaged_factors_are_not_exact():
    weights = [alone("fedit", client, lr=0.05)[0] for client in range(4)]
    sim = simulate(create("fedit", lr=0.05))
    sim.round()
    assert float((evaluated(sim) - sum(weights) / 4).abs().max()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_averaged_by_samples(name):
    ranks = (2, 2, 2) if ALGORITHMS.load(name).equal_ranks else (1, 3, 2)
    heads = []
    for client in range(3):
        one = simulate(create(name), ranks, [[client]])
        one.round()
        heads.append(one.params[f"{HEAD}.weight"])
    sim = simulate(create(name), ranks, weighting="samples")
    sim.round()
    expected = sum(p * head for p, head in zip([7 / 24, 12 / 24, 5 / 24], heads, strict=True))
    torch.testing.assert_close(sim.params[f"{HEAD}.weight"], expected, rtol=0, atol=1e-12)


# ------------------------------------------------------------------ limits


def test_flexlora_is_ilora_by_svd_without_variates_bit_for_bit():
    one = simulate(create("flexlora"), model=adapted())
    two = simulate(create("ilora", decomposition="svd", cv=False), model=adapted())
    for _ in range(3):
        one.round(), two.round()
    assert torch.equal(one.flat, two.flat)
    assert not two.client_states


def test_lora_fair_with_a_large_ridge_is_fedit():
    one, two = simulate(create("fedit")), simulate(create("lora_fair", lam=1e14))
    for _ in range(3):
        one.round(), two.round()
    torch.testing.assert_close(one.flat, two.flat, rtol=0, atol=1e-10)


def test_lora_fair_is_nearer_to_the_average_than_fedit():
    exact = sum(alone("fedit", client, lr=0.05)[0] for client in range(4)) / 4
    errors = {}
    for name in ("fedit", "lora_fair"):
        sim = simulate(create(name, lr=0.05))
        sim.round()
        errors[name] = float((evaluated(sim) - exact).norm())
    assert errors["lora_fair"] < errors["fedit"]


def test_hetlora_follows_the_larger_product():
    sim = simulate(create("hetlora"), (2, 2))
    uploads = [(0, 0.5, drive.upload(sim, 2, 1.0)), (1, 0.5, drive.upload(sim, 2, 100.0))]
    flat, _ = sim.algorithm.server_step({}, sim.flat, uploads, drive.context(sim))
    a = uploads[1][2][f"{LAYER}.lora_A.default.weight"]
    found = sim.learner.spec.unflatten(flat)[f"{LAYER}.lora_A.default.weight"]
    first = uploads[0][2][f"{LAYER}.lora_A.default.weight"]
    sizes = [torch.linalg.matrix_norm(drive.product(u)) for _, _, u in uploads]
    torch.testing.assert_close(found, (sizes[0] * first + sizes[1] * a) / sum(sizes))


# ------------------------------------------------------------------ control variates


def copies(count, size=9):
    (data,) = toy.clients((size,), dtype=torch.float64)
    return [data] * count


def test_copies_of_one_client_need_no_correction():
    sims = [simulate(create("ilora", cv=cv), (2, 2, 2), data=copies(3), shuffle=False) for cv in (True, False)]
    for _ in range(4):
        for sim in sims:
            sim.round()
        torch.testing.assert_close(sims[0].flat, sims[1].flat, rtol=0, atol=1e-9)
    for state in sims[0].client_states.values():
        torch.testing.assert_close(state["c"], sims[0].server_state["c"], rtol=0, atol=1e-12)


def test_a_single_client_has_no_correction():
    sims = [simulate(create("ilora", cv=cv), (3,), data=copies(1)) for cv in (True, False)]
    for _ in range(3):
        for sim in sims:
            sim.round()
    torch.testing.assert_close(sims[0].flat, sims[1].flat, rtol=0, atol=1e-10)


@pytest.mark.parametrize("transport", [False, True])
def test_modes_of_rows_coincide_at_equal_ranks(transport):
    sims = [
        simulate(create("ilora", cv_rows=rows, cv_transport=transport), (2,) * 4, [[0, 1], [2, 3], [0, 3], [1, 2]])
        for rows in ("covering", "all")
    ]
    for _ in range(4):
        for sim in sims:
            sim.round()
        assert torch.equal(sims[0].flat, sims[1].flat)


def test_c_is_the_mean_of_all_variates_in_every_row():
    """Over the clients that have the row, zero for those never sampled; so corrections add up to zero."""
    sim = simulate(create("ilora"), cohorts=[[0, 1], [1, 3], [0, 3], [1, 2]])
    for _ in range(3):
        sim.round()
    c = sim.learner.spec.unflatten(sim.server_state["c"])
    own = {k: sim.algorithm.spec.ranks[sim.ranks[k]].unflatten(s["c"]) for k, s in sim.client_states.items()}
    assert set(own) == {0, 1, 3}
    a, b = (f"{LAYER}.lora_{side}.default.weight" for side in "AB")
    for row in range(3):
        having = [k for k, rank in enumerate(sim.ranks) if rank > row]
        for name, view in ((a, lambda v, i: v[i]), (b, lambda v, i: v[:, i])):
            total = sum(view(own[k][name], row) for k in having if k in own)
            torch.testing.assert_close(view(c[name], row), total / len(having), rtol=0, atol=1e-12)
    head = f"{HEAD}.weight"
    torch.testing.assert_close(c[head], sum(o[head] for o in own.values()) / 4, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("engine", ["pool", "batched"])
def test_variates_of_some_batches_are_the_same_in_every_engine(engine, batches):
    data, model = lambda: engines.clients(dtype=torch.float64), adapted("qr_scaled")
    algorithm = create("ilora", control_batches=batches, clip_grad=0.5)
    first = engines.simulate(algorithm, model, data(), ranks=(2,) * 6)
    second = engines.simulate(algorithm, model, data(), engine, ranks=(2,) * 6)
    engines.run(first), engines.run(second)
    assert second.engine == engine
    if engine == "pool":
        assert not difference(engines.state(first), engines.state(second))
        return
    torch.testing.assert_close(first.flat, second.flat, rtol=0, atol=1e-11)
    torch.testing.assert_close(first.server_state["c"], second.server_state["c"], rtol=0, atol=1e-11)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("name", ["rolora", "fedex_lora"])
def test_unequal_ranks_are_refused_where_they_cannot_be(name):
    with pytest.raises(UserError, match=r"one rank, not 1, 2, 3; give one"):
        simulate(create(name))


@pytest.mark.parametrize("name", NAMES)
def test_models_without_adapters_are_refused(name):
    with pytest.raises(UserError, match=r"--lora\.ranks"):
        Simulation(toy.mlp(), toy.clients(), create(name))


def test_ffa_lora_wants_one_a():
    with pytest.raises(UserError, match="kaiming"):
        simulate(create("ffa_lora"), model=adapted("qr_scaled"))
    with pytest.raises(UserError, match="scaling"):
        simulate(create("ffa_lora"), model=lambda rank: inject(base(), rank, scaling=4 / rank))


def test_a_head_that_is_frozen_leaves_nothing_to_train():
    def frozen(rank):
        net = adapted()(rank)
        net.get_submodule(HEAD).requires_grad_(False)
        return net

    with pytest.raises(UserError, match=r"--lora\.head"):
        simulate(create("lora_head"), model=frozen)
    sim = simulate(create("fedit"), model=frozen)
    sim.round()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ilora", {"decomposition": "lu"}),
        ("ilora", {"residual": "keep"}),
        ("ilora", {"cv_rows": "some"}),
        ("ilora", {"control_batches": -1}),
        ("ilora", {"control_scale": 0.0}),
        ("fedit", {"optimizer": "muon"}),
        ("fedit", {"b2": 1.0}),
        ("fedit", {"momentum": -0.1}),
        ("fedit", {"eps": 0.0}),
        ("flora", {"restart": "never"}),
        ("lora_fair", {"lam": 0.0}),
        ("hetlora", {"gamma": 1.0}),
        ("hetlora", {"prune": -1.0}),
    ],
)
def test_bad_options_are_named(name, options):
    with pytest.raises(UserError, match=next(iter(options))):
        create(name, **options)


def test_without_ranks_all_clients_share_one_model():
    module = adapted()(2)
    data = [TensorDataset(*d.tensors) for d in toy.clients(dtype=torch.float64)]
    sim = Simulation(module, data, create("ilora"), fraction=1.0, batch_size=4, rounds=2)
    start = evaluated(sim)
    sim.round(), sim.round()
    assert not torch.equal(evaluated(sim), start)
