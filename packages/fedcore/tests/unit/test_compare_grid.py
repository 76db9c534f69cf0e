"""Grids of a comparison: which lists are tried, how cells are named, what their settings are."""

import pytest
from fedcore.algorithms import create
from fedcore.compare_grid import Cell, edges, said, short_names, split_grid
from fedcore.compare_report import pick_rates
from fedcore.compare_screen import next_cells
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


def landscape(best, seeds=(0, 1, 2), diverged=()):
    """A comparison over two options whose validation accuracy falls with the distance from ``best``, per seed."""
    config = CompareConfig(
        methods={"a": {"algorithm": "fedprox", "lr": [0.1, 0.2, 0.3, 0.4], "mu": [1.0, 2.0, 3.0, 4.0]}},
        seeds=list(seeds),
        screen=1,
        tail=1,
    )

    def run(cell):
        point = dict(cell.point)
        x, y = best[cell.seed]
        far = abs(point["lr"] * 10 - x) + abs(point["mu"] - y)
        status = "diverged" if (point["lr"], point["mu"], cell.seed) in diverged else "finished"
        return {"status": status, "rate": point["lr"], "rounds": {"round": 1, "val/accuracy": 0.9 - 0.1 * far}}

    return config, run


def climb(config, run):
    """Run until nothing is missing; the records and the number of cells of each stage."""
    records, stages = {}, []
    while todo := next_cells(config, records):
        stages.append(len(todo))
        records |= {cell.key: run(cell) for cell in todo}
    return records, stages


def test_screening_runs_the_grid_once_and_all_seeds_around_the_best():
    config, run = landscape({seed: (2, 2) for seed in range(3)})
    records, stages = climb(config, run)
    assert stages == [16, 10]  # the best and its four neighbours on the two other seeds
    (row,) = pick_rates(config, records)
    assert (row.point, row.of, row.runs, row.edges) == ({"lr": 0.2, "mu": 2.0}, 16, 26, ())


def test_screening_goes_on_where_the_other_seeds_see_it_otherwise():
    config, run = landscape({0: (1, 1), 1: (4, 4), 2: (4, 4)})
    records, stages = climb(config, run)
    assert len(stages) > 2
    (row,) = pick_rates(config, records)
    assert row.point == {"lr": 0.4, "mu": 4.0}
    assert row.edges == ("lr", "mu")


def test_screening_leaves_out_what_diverges():
    config, run = landscape({seed: (2, 2) for seed in range(3)}, diverged={(0.2, 2.0, 2)})
    records, _ = climb(config, run)
    (row,) = pick_rates(config, records)
    assert row.point != {"lr": 0.2, "mu": 2.0}
    assert row.diverged == ((("lr", 0.2), ("mu", 2.0)),)
    everywhere = {(x, y, 0) for x in (0.1, 0.2, 0.3, 0.4) for y in (1.0, 2.0, 3.0, 4.0)}
    config, run = landscape({seed: (2, 2) for seed in range(3)}, diverged=everywhere)
    records, stages = climb(config, run)
    assert stages == [16]
    assert pick_rates(config, records)[0].records == {}


def test_without_screening_every_seed_has_the_whole_grid():
    config, run = landscape({seed: (2, 2) for seed in range(3)})
    config.screen = 0
    assert [len(next_cells(config, {})), climb(config, run)[1]] == [48, [48]]
    assert [cell.seed for cell in next_cells(config, {})] == sorted(cell.seed for cell in next_cells(config, {}))
