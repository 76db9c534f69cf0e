"""Grids of a comparison: which lists are tried, how cells are named, what their settings are."""

import pytest
from fedcore.algorithms import create
from fedcore.compare_grid import Cell, edges, said, short_names, split_grid
from fedcore.compare_settings import CompareConfig, settings_hash
from fedcore.lora_settings import LoraConfig
from polymodal.errors import UserError


def test_lists_are_tried_in_all_combinations_the_rate_first():
    method = split_grid("a", "fedprox", {"mu": [0.1, 1], "weight_decay": 0.0, "lr": [0.1, 0.2]})
    assert method.options == {"weight_decay": 0.0}
    assert method.grid == {"lr": (0.1, 0.2), "mu": (0.1, 1.0)}
    assert method.points == [(("lr", r), ("mu", m)) for r in (0.1, 0.2) for m in (0.1, 1.0)]
    cell = Cell(method, method.points[1], 3)
    assert cell.name == "a-lr0.1-mu1-seed3"
    assert cell.options == {"weight_decay": 0.0, "lr": 0.1, "mu": 1.0}


def test_one_rate_names_the_file_and_none_leaves_the_algorithms_own():
    assert [Cell(m, m.points[0], 0).name for m in (split_grid("a", "fedavg", {"lr": 1}),)] == ["a-lr1-seed0"]
    method = split_grid("a", "fedavg", {"lr": []})
    assert method.points == [()]
    assert Cell(method, (), 0).name == "a-seed0"


def test_options_that_take_a_list_are_tried_by_a_list_of_lists():
    one = split_grid("a", "fedavg", {"lora.ranks": [2, 4, 6]})
    assert (one.options, one.grid) == ({"lora.ranks": [2, 4, 6]}, {})
    several = split_grid("a", "fedavg", {"lora.ranks": [[4], [2, 4, 6]], "lora.init": ["qr", "kaiming"]})
    assert several.grid == {"lora.ranks": ((4,), (2, 4, 6)), "lora.init": ("qr", "kaiming")}
    assert Cell(several, several.points[2], 0).name == "a-ranks2-4-6-initqr-seed0"


def test_groups_reach_the_cell():
    config = CompareConfig(
        methods={"a": {"algorithm": "fedavg", "lora.ranks": [[4], [2, 6]], "lora.init": "qr"}},
        seeds=[0],
        lora=LoraConfig(ranks=[2, 4], scaling=3.0),
    )
    first, second = config.cells()
    assert (config.lora_of(first).ranks, config.lora_of(second).ranks) == ([4], [2, 6])
    assert (config.lora_of(first).init, config.lora_of(first).scaling) == ("qr", 3.0)
    assert config.lora.ranks == [2, 4]
    hashes = {settings_hash(config.settings(cell, create("fedavg"), "f")) for cell in (first, second)}
    assert len(hashes) == 2


def test_options_of_a_group_are_no_options_of_the_algorithm():
    method = split_grid("a", "fedavg", {"lora.dropout": 0, "lr": 0.1})
    cell = Cell(method, method.points[0], 0)
    assert cell.options == {"lr": 0.1}
    assert cell.group("lora") == {"dropout": 0.0}
    assert cell.group("privacy") == {}


def test_a_private_method_has_its_clip_in_the_grid():
    config = CompareConfig(methods={"dp": {"algorithm": "dp_fedavg", "lr": 0.1, "privacy.clip": [1, 0.5]}}, seeds=[0])
    config.privacy.noise_multiplier = 0.8
    cells = list(config.cells())
    assert [cell.name for cell in cells] == ["dp-lr0.1-clip1-seed0", "dp-lr0.1-clip0.5-seed0"]
    found = [config.settings(cell, create("dp_fedavg", **cell.options), "f")["privacy"] for cell in cells]
    assert [(f["clip"], f["noise_multiplier"]) for f in found] == [(1.0, 0.8), (0.5, 0.8)]


@pytest.mark.parametrize(
    ("options", "said_of_it"),
    [
        ({"privacy.clip": [1.0]}, "fedavg, which is not private"),
        ({"privacy": {"clip": 1.0}}, "privacy.OPTION"),
        ({"lora.rank": 4}, "no option lora.rank"),
        ({"lorra.ranks": [4]}, "no options lorra"),
        ({"weight_decay": []}, "at least one value"),
        ({"weight_decay": [0.1, 0.1]}, "none of them twice"),
        ({"weight_decay": ["1e-3", 0.1]}, "write 0.001"),
        ({"lora.scaling": "1e1"}, "write 10"),
        ({"lr": [0.1, 0.1]}, "none of them twice"),
        ({"lr": [True]}, "expected numbers"),
    ],
)
def test_bad_grids_are_one_line(options, said_of_it):
    with pytest.raises(UserError, match="^a: ") as problem:
        split_grid("a", "fedavg", options)
    assert said_of_it in str(problem.value)


def test_values_out_of_range_are_refused_before_anything_runs():
    config = CompareConfig(methods={"a": {"algorithm": "fedavg", "lora.ranks": [4], "lora.dropout": [0.1, 2]}})
    cells = list(config.cells())
    assert config.lora_of(cells[0]).dropout == 0.1
    with pytest.raises(UserError, match=r"lora\.dropout=2"):
        config.lora_of(cells[1])


def test_edges_are_of_numbers_with_a_choice():
    grid = {"lr": (0.1,), "clip": (1.0, 0.5, 2.0), "kind": ("a", "b"), "on": (True, False)}
    assert edges(grid, {"lr": 0.1, "clip": 1.0, "kind": "a", "on": True}) == ()
    assert edges(grid, {"lr": 0.1, "clip": 0.5, "kind": "a", "on": True}) == ("clip",)
    assert edges(grid, {"lr": 0.1, "clip": 2.0, "kind": "b", "on": False}) == ("clip",)


def test_words():
    assert [said(v) for v in (0.1, 10, True, None, (2, 4), "qr")] == ["0.1", "10", "true", "null", "2-4", "qr"]
    assert short_names(["lr", "privacy.clip"]) == {"lr": "lr", "privacy.clip": "clip"}
    assert short_names(["clip", "privacy.clip"]) == {"clip": "clip", "privacy.clip": "privacy.clip"}


def test_every_seed_has_the_same_validation_and_test_samples():
    from fedcore.data.digits import Digits
    from fedcore.world import build_world
    from fedcore.world_settings import PartitionConfig

    partition = PartitionConfig(scheme="dirichlet_label", clients=3, alpha=0.3)
    worlds = [build_world(Digits(), partition, val_share=0.2, seed=seed) for seed in (0, 1)]
    for split in ("val", "test", "train"):
        first, second = (getattr(world, split) for world in worlds)
        assert first.targets.equal(second.targets)
        assert first.inputs.equal(second.inputs)
    assert worlds[0].partition.sizes != worlds[1].partition.sizes
