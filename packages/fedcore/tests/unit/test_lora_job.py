"""From options to models of unequal ranks, a base of its own, and what a resumed run must agree with."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fedcore.adapters import find_adapters
from fedcore.algorithms import create
from fedcore.data.digits import Digits
from fedcore.lora.job import (
    BASE,
    adapted,
    describe,
    export,
    facts_of,
    keep_base,
    prepare_base,
    refuse_other_adapters,
)
from fedcore.lora_settings import LoraConfig
from fedcore.models import build
from fedcore.simulation import Simulation
from fedcore.world import build_world
from fedcore.world_settings import PartitionConfig
from polymodal.errors import UserError
from torch.utils.data import TensorDataset


def mlp(seed=0, hidden=(12, 8)):
    torch.manual_seed(seed)
    return build("mlp", num_classes=3, input_shape=(10,), hidden=hidden)


def points(count=24, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 10, generator=draw), torch.randint(3, (count,), generator=draw))


def simulation(model, lora, algorithm, clients=3, **options):
    modules, ranks = adapted(model, lora, algorithm, clients)
    data = [points(seed=i) for i in range(clients)]
    return Simulation(modules, data, algorithm, ranks=ranks, batch_size=8, fraction=1.0, rounds=3, **options)


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ranks": "2,x"}, "lora.ranks=2,x; expected whole numbers of at least 1"),
        ({"ranks": [0]}, "expected whole numbers of at least 1"),
        ({"ranks": [2, 4], "alpha": 16.0}, "alpha=16 over ranks 2,4 scales clients differently; give lora.scaling"),
        ({"ranks": [2], "scaling": 0.0}, "lora.scaling=0.0; expected more than 0"),
        ({"ranks": [2], "dropout": 1.0}, "expected 0 <= dropout < 1"),
        ({"ranks": [2], "pretrain_share": 1.0}, "expected 0 < pretrain_share < 1"),
        ({"ranks": [2], "pretrain_lr": 0.0}, "lora.pretrain_lr=0.0; expected more than 0"),
        ({"ranks": [2], "pretrain_batch_size": 0}, "expected at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        LoraConfig(**options)


def test_scaling_is_the_same_for_all_ranks_unless_alpha_is_asked_for():
    config = LoraConfig(ranks="2, 4,8", targets="query,value")
    assert (config.ranks, config.targets, config.on) == ([2, 4, 8], ["query", "value"], True)
    assert {config.scaling_of(rank) for rank in config.ranks} == {2.0}
    unequal = LoraConfig(ranks=[2, 8], alpha=16.0, unequal_scaling=True)
    assert [unequal.scaling_of(rank) for rank in unequal.ranks] == [8.0, 2.0]
    assert not LoraConfig().on
    assert not LoraConfig(pretrain_epochs=3).pretrains, "without adapters there is nothing to train it for"


# ------------------------------------------------------------------ ranks


def test_ranks_are_repeated_in_turn():
    modules, ranks = adapted(mlp(), LoraConfig(ranks=[2, 4, 6]), create("fedit"), 8)
    assert ranks == [2, 4, 6, 2, 4, 6, 2, 4]
    assert {rank: {info.rank for info in find_adapters(modules(rank))} for rank in (2, 4, 6)} == {
        2: {2},
        4: {4},
        6: {6},
    }


def test_methods_of_one_shape_need_one_rank():
    with pytest.raises(UserError, match=r"FedAvg averages models of one shape, not of ranks 2,4; give one rank, or"):
        adapted(mlp(), LoraConfig(ranks=[2, 4]), create("fedavg"), 3)
    _, ranks = adapted(mlp(), LoraConfig(ranks=[2, 4]), create("fedavg"), 1)
    assert ranks == [2], "one client has one rank"
    for name in ("fedavg", "fedadamw", "fedmuon", "scaffold"):
        trained = simulation(mlp(), LoraConfig(ranks=[4]), create(name, lr=0.05))
        before = trained.evaluate(points())["loss"]
        trained.run(3)
        assert trained.evaluate(points())["loss"] < before, name


def test_the_method_chooses_the_start():
    model = mlp()
    for name in ("ilora", "fedit"):
        modules, _ = adapted(model, LoraConfig(ranks=[2]), create(name), 1)
        factors = [modules(2).get_parameter(info.b) for info in find_adapters(modules(2))]
        assert all(bool(b.any()) == (name == "ilora") for b in factors)
    modules, _ = adapted(model, LoraConfig(ranks=[2], init="qr"), create("fedit"), 1)
    b = modules(2).get_parameter(find_adapters(modules(2))[0].b)
    torch.testing.assert_close(b.mT @ b, torch.eye(2))


@pytest.mark.parametrize("name", ["ilora", "fedit"])
def test_the_function_stays_at_every_rank(name):
    model, (x, _) = mlp(), points().tensors
    modules, _ = adapted(model, LoraConfig(ranks=[2, 6]), create(name), 2)
    for rank in (2, 6):
        torch.testing.assert_close(modules(rank)(x), model(x), rtol=1e-5, atol=1e-6)


def test_random_starts_depend_on_the_seed_and_are_nested():
    def factor(rank, seed):
        module = adapted(mlp(), LoraConfig(ranks=[2, 6]), create("fedit"), 2, seed)[0](rank)
        return module.get_parameter(find_adapters(module)[0].a)

    assert torch.equal(factor(2, 0), factor(6, 0)[:2])
    assert not torch.equal(factor(2, 0), factor(2, 1))


def test_models_of_all_ranks_share_what_is_frozen_for_good():
    model = mlp()
    modules, _ = adapted(model, LoraConfig(ranks=[2, 4]), create("ilora"), 2)
    one, other = modules(2), modules(4)
    (bias,) = [name for name, _ in one.named_parameters() if name == "1.base_layer.bias"]
    assert one.get_parameter(bias).data_ptr() == other.get_parameter(bias).data_ptr()
    assert one.get_parameter("1.base_layer.weight").data_ptr() != other.get_parameter("1.base_layer.weight").data_ptr()


# ------------------------------------------------------------------ a base of its own


PRETRAIN = {"ranks": [2], "pretrain_epochs": 4, "pretrain_share": 0.3, "pretrain_labels": [0, 1, 2, 3, 4]}


def test_no_client_has_a_sample_of_the_base():
    lora = LoraConfig(**PRETRAIN, pretrain_data={"rotate": 0})
    data = Digits(rotate=90)
    world = build_world(data, PartitionConfig(clients=5), val_share=0.1, seed=0, lora=lora)
    plain = build_world(data, PartitionConfig(clients=5), val_share=0.1, seed=0)
    assert plain.pretrain is None
    assert len(world.train) + len(world.pretrain) == len(plain.train)
    assert torch.equal(world.val.inputs, plain.val.inputs)
    assert set(world.pretrain.targets.tolist()) == {0, 1, 2, 3, 4}
    small = (plain.labels < 5).sum()
    assert len(world.pretrain) == pytest.approx(0.3 * small, abs=3)
    rows = {picture.numpy().tobytes() for picture in plain.train.inputs.rot90(-1, (2, 3))}
    assert all(picture.numpy().tobytes() in rows for picture in world.pretrain.inputs), "upright"
    other = build_world(data, PartitionConfig(clients=5), val_share=0.1, seed=4, lora=lora)
    assert torch.equal(other.pretrain.inputs, world.pretrain.inputs), "the same for every seed"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pretrain_labels": [11]}, "no training sample has label 11"),
        ({"pretrain_share": 1e-5}, "leaves no sample to train the base on"),
        ({"pretrain_data": {"rotat": 0}}, "digits has no option 'rotat'"),
        ({"pretrain_data": {"test_samples": 400}}, "has other samples"),
    ],
)
def test_a_base_that_cannot_be_trained_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        build_world(Digits(), PartitionConfig(), val_share=0.1, seed=0, lora=LoraConfig(**{**PRETRAIN, **options}))


def test_the_base_is_trained_the_same_each_time_and_has_a_new_head():
    lora, data = LoraConfig(ranks=[2], pretrain_epochs=20, pretrain_lr=0.01), points(60)
    bases = [mlp() for _ in range(3)]
    start = {name: value.clone() for name, value in bases[0].state_dict().items()}
    for base, seed in zip(bases, (0, 0, 1), strict=True):
        torch.manual_seed(seed + 100)
        before = torch.random.get_rng_state()
        prepare_base(base, F.cross_entropy, data, lora, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before), "no draw of others is moved"
    one, again, other = (base.state_dict() for base in bases)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["1.weight"], other["1.weight"])
    for name in start:
        assert torch.equal(one[name], start[name]) == name.startswith("5."), name
    untouched = mlp()
    prepare_base(untouched, F.cross_entropy, None, lora, seed=0)
    assert all(torch.equal(value, start[name]) for name, value in untouched.state_dict().items())


def test_a_kept_base_is_taken_as_it_is(tmp_path):
    lora, base = LoraConfig(ranks=[2], pretrain_epochs=3), mlp()
    prepare_base(base, F.cross_entropy, points(), lora, seed=0, stored=tmp_path / BASE)
    keep_base(tmp_path, base)
    again = mlp(3)
    prepare_base(again, F.cross_entropy, points(seed=8), lora, seed=9, stored=tmp_path / BASE)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in base.state_dict().items())
    stamp = (tmp_path / BASE).stat().st_mtime_ns
    keep_base(tmp_path, again)
    assert (tmp_path / BASE).stat().st_mtime_ns == stamp, "written once"
    with pytest.raises(UserError, match="holds the base of another model"):
        prepare_base(mlp(hidden=(9, 8)), F.cross_entropy, points(), lora, seed=0, stored=tmp_path / BASE)


def test_a_base_that_diverges_is_refused():
    data = points()
    data.tensors[0][3] = float("inf")
    with pytest.raises(UserError, match=r"the base's loss is nan in epoch 1; lower lora\.pretrain_lr"):
        prepare_base(mlp(), F.cross_entropy, data, LoraConfig(ranks=[2], pretrain_epochs=2), seed=0)


# ------------------------------------------------------------------ facts


def facts(lora=None, model=None):
    model = model or mlp()
    lora = lora or LoraConfig(ranks=[2, 4])
    return facts_of(simulation(model, lora, create("fedit")), lora, model)


def test_a_resumed_run_must_have_the_same_adapters(tmp_path):
    before = facts()
    assert before["ranks"] == [2, 4]
    assert before["layers"] == ["1", "3"]
    assert before["head"] == ["5"]
    refuse_other_adapters(tmp_path, before, facts())
    for options, said in (
        ({"ranks": [2, 6]}, "a run with lora.ranks 2,4, not 2,6; leave that option out"),
        ({"ranks": [2, 4], "targets": ["3"]}, "a run with lora.targets 1,3, not 3"),
        ({"ranks": [2, 4], "scaling": 1.0}, "a run with lora.scaling 2.0,2.0, not 1.0,1.0"),
    ):
        with pytest.raises(UserError, match=said):
            refuse_other_adapters(tmp_path, before, facts(LoraConfig(**options)))
    with pytest.raises(UserError, match="the base under its adapters has other weights now"):
        refuse_other_adapters(tmp_path, before, facts(model=mlp(1)))
    with pytest.raises(UserError, match="a run with adapters of ranks 2,4; leave the options of lora out"):
        refuse_other_adapters(tmp_path, before, None)
    with pytest.raises(UserError, match="a run without adapters"):
        refuse_other_adapters(tmp_path, None, before)
    refuse_other_adapters(tmp_path, None, None)


def test_what_is_trained_is_told():
    lora = LoraConfig(ranks=[2, 4])
    text = describe(simulation(mlp(), lora, create("fedit")))
    assert "ranks 2,4 on 2 layers (1, 3); trained whole: 5; " in text
    count = 4 * (10 + 12) + 4 * (12 + 8) + 27
    assert f"{count} parameters are trained at rank 4" in text


# ------------------------------------------------------------------ what a run leaves


@pytest.mark.parametrize(("name", "what"), [("ilora", "adapter"), ("fedit", "adapter"), ("flora", "merged")])
def test_what_was_trained_is_written_for_others(name, what, tmp_path):
    model, lora = mlp(hidden=(12, 12)), LoraConfig(ranks=[2, 4])
    options = {"residual": "drop"} if name == "ilora" else {}
    trained = simulation(model, lora, create(name, lr=0.02, **options))
    trained.run(6)
    module = trained.model
    text = export(tmp_path, module, model, None)
    assert text.startswith(str(tmp_path / what)), text
    assert [path.name for path in tmp_path.iterdir()] == [what]
    x = points().tensors[0]
    if what == "merged":
        from safetensors.torch import load_file

        plain = mlp(5, hidden=(12, 12))
        plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
        torch.testing.assert_close(plain(x), module(x), rtol=1e-5, atol=1e-5)
        return
    restored, _ = adapted(model, LoraConfig(adapter=tmp_path / "adapter"), create("fedit"), 1)
    (rank,) = adapted(model, LoraConfig(adapter=tmp_path / "adapter"), create("fedit"), 1)[1]
    assert rank == (8 if name == "ilora" else 4)
    torch.testing.assert_close(restored(rank)(x), module(x), rtol=1e-5, atol=1e-5)


def test_an_adapter_to_start_from_must_be_of_this_base(tmp_path):
    model = mlp()
    trained = simulation(model, LoraConfig(ranks=[4]), create("fedit", lr=0.02))
    trained.run(2)
    export(tmp_path, trained.model, model, None)
    path = tmp_path / "adapter"
    x, expected = points().tensors[0], trained.model(points().tensors[0])
    modules, ranks = adapted(model, LoraConfig(adapter=path, ranks=[4, 6], scaling=0.5), create("ilora"), 2)
    for rank in ranks:
        torch.testing.assert_close(modules(rank)(x), expected, rtol=1e-4, atol=1e-5)
    for options, base, said in (
        ({}, mlp(hidden=(9, 8)), "is of another base: 1 has a weight of 12x10 there, 9x10 here"),
        ({"init": "qr"}, model, "lora.init=qr would replace the factors of lora.adapter"),
        ({"targets": ["3"]}, model, "also adapts 1, which is none of lora.targets"),
        ({"targets": ["1", "3", "7"]}, model, "lora.targets 7: the adapter"),
    ):
        with pytest.raises(UserError, match=said):
            adapted(base, LoraConfig(adapter=path, **options), create("fedit"), 2)


def test_turned_pictures_have_another_fingerprint():
    upright, turned = Digits(), Digits(rotate=90)
    assert upright.fingerprint() == "74a3097dd0538296", "as in the committed results"
    assert turned.fingerprint() != upright.fingerprint()
    np.testing.assert_array_equal(
        turned.load("test").inputs.numpy(), np.rot90(upright.load("test").inputs.numpy(), axes=(2, 3))
    )
    assert torch.equal(turned.load("test").targets, upright.load("test").targets)
    with pytest.raises(UserError, match="rotate=45; expected 0"):
        Digits(rotate=45)
