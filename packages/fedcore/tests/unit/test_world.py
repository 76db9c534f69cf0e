"""Clients, validation samples and starting weights: functions of the seed, the same for every method."""

import numpy as np
import pytest
import torch
from fedcore.data.arrays import ArrayData
from fedcore.data.digits import Digits
from fedcore.partition import Partition
from fedcore.world import build_world, cut_validation, make_model, make_partition
from fedcore.world_settings import ModelConfig, PartitionConfig
from polymodal.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return Digits()


def test_validation_takes_the_same_share_of_every_label():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 20)
    kept, held = cut_validation(labels, 0.2)
    assert np.bincount(labels[held]).tolist() == [10, 6, 4]
    assert sorted([*kept, *held]) == list(range(100))
    assert cut_validation(labels, 0.0)[1].tolist() == []
    np.testing.assert_array_equal(held, cut_validation(labels, 0.2)[1])


def test_no_client_has_a_validation_or_test_sample(digits):
    world = build_world(digits, PartitionConfig(clients=7, samples=40), val_share=0.25, seed=3)
    key = {picture.numpy().tobytes() for client in world.clients for picture in client.inputs}
    # some digits occur twice in the data; those few are no leak
    twins = {p.numpy().tobytes() for p in digits.load("train").inputs[cut_validation(world_labels(digits), 0.25)[0]]}
    for held in (world.val, world.test):
        assert not [p for p in held.inputs if p.numpy().tobytes() in key and p.numpy().tobytes() not in twins]
    assert [len(client) for client in world.clients] == [40] * 7
    assert len(world.train) + len(world.val) == len(digits.load("train"))


def world_labels(data):
    return data.partition_labels("train")


def test_seed_moves_clients_but_not_the_validation_samples(digits):
    worlds = [build_world(digits, PartitionConfig(), val_share=0.2, seed=seed) for seed in (0, 1)]
    assert torch.equal(worlds[0].val.inputs, worlds[1].val.inputs)
    assert any(not np.array_equal(a, b) for a, b in zip(*(w.partition for w in worlds), strict=True))
    fixed = [build_world(digits, PartitionConfig(seed=5), val_share=0.2, seed=seed) for seed in (0, 1)]
    assert all(np.array_equal(a, b) for a, b in zip(*(w.partition for w in fixed), strict=True))


@pytest.mark.parametrize("scheme", ["dirichlet_client", "dirichlet_label", "shards", "iid"])
def test_schemes(digits, scheme):
    world = build_world(digits, PartitionConfig(scheme=scheme, clients=9), val_share=0.0, seed=0)
    assert world.partition.how["scheme"] == scheme
    assert len(world.clients) == 9
    assert world.val is None


def test_natural_clients_and_stored_partitions(tmp_path, digits):
    groups = torch.tensor([1, 0, 1, 0, 1])
    data = ArrayData(torch.zeros(5, 2), torch.zeros(5).long(), groups=groups, group_names=["a", "b"])
    found = make_partition(PartitionConfig(scheme="column"), data, np.zeros(5, dtype=int), 0)
    assert [part.tolist() for part in found] == [[1, 3], [0, 2, 4]]
    Partition((np.array([0, 2]), np.array([4])), 5).save(tmp_path / "p.json")
    stored = make_partition(PartitionConfig(file=tmp_path / "p.json"), data, np.zeros(5, dtype=int), 0)
    assert [part.tolist() for part in stored] == [[0, 2], [4]]
    with pytest.raises(UserError, match="no natural clients"):
        build_world(digits, PartitionConfig(scheme="column"), val_share=0.0, seed=0)


def test_starting_weights_belong_to_the_seed(digits):
    world = build_world(digits, PartitionConfig(), val_share=0.0, seed=0)
    config = ModelConfig("mlp", {"hidden": [5]})
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (list(make_model(config, world, seed=s).parameters()) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_options_out_of_range():
    with pytest.raises(UserError, match=r"partition\.clients=0"):
        PartitionConfig(clients=0)
    with pytest.raises(UserError, match="val_share=1"):
        build_world(Digits(), PartitionConfig(), val_share=1.0, seed=0)
