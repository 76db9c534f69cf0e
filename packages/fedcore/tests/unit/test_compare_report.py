"""Picking and the table, on made-up records whose means and intervals are known."""

import math

import pytest
from fedcore.compare_report import pick_rates, tail_mean, to_table
from fedcore.compare_settings import CompareConfig
from fedcore.lora_settings import LoraConfig


def record(val, test, status="finished", rate=0.1):
    rounds = list(range(1, len(test) + 1))
    metrics = {"test/accuracy": test[-1], "comm/up_bytes_total": 2.0**21, "comm/down_bytes_total": 2.0**20}
    return {
        "status": status,
        "settings": {},
        "rate": rate,
        "seconds": 1.5,
        "metrics": metrics,
        "rounds": {"round": rounds, "val/accuracy": val, "test/accuracy": test},
    }


def at(rate, **others):
    """A point of a grid."""
    return (("lr", rate), *((name.replace("__", "."), value) for name, value in others.items()))


def make(pick="val", **options):
    config = CompareConfig(
        methods={"a": {"algorithm": "fedavg", "lr": [0.1, 0.2]}, "b": {"algorithm": "fedswa", "lr": [0.1, 0.2]}},
        seeds=[0, 1, 2],
        tail=2,
        pick=pick,
        rounds=3,
        **options,
    )
    records = {}
    for label, lift in (("a", 0.0), ("b", 0.1)):
        for seed in (0, 1, 2):
            # 0.1 is better on validation, 0.2 on test
            up = 0.01 * seed
            records[label, at(0.1), seed] = record([0.1, 0.7, 0.7], [0.2, 0.5 + lift + up, 0.6 + lift + up], rate=0.1)
            records[label, at(0.2), seed] = record([0.1, 0.6, 0.6], [0.2, 0.7 + lift, 0.8 + lift + up], rate=0.2)
    return config, records


def test_tail_is_the_mean_of_the_last_values():
    found = record([0.0, 0.5, None], [0.1, 0.2, 0.6])
    assert tail_mean(found, "test/accuracy", 2) == pytest.approx(0.4)
    assert tail_mean(found, "val/accuracy", 10) == pytest.approx(0.25)
    assert tail_mean(found, "test/loss", 2) is None
    found["rounds"]["test/accuracy"] = 0.3  # the same in every round
    assert tail_mean(found, "test/accuracy", 2) == pytest.approx(0.3)


@pytest.mark.parametrize(("pick", "rates"), [("val", [0.1, 0.1]), ("test", [0.2, 0.2])])
def test_each_method_gets_its_best_rate(pick, rates):
    config, records = make(pick)
    assert [row.rate for row in pick_rates(config, records)] == rates


def test_one_row_a_rate_without_picking():
    config, records = make("none")
    assert [row.label for row in pick_rates(config, records)] == ["a 0.1", "a 0.2", "b 0.1", "b 0.2"]


def test_one_diverged_seed_takes_a_rate_out():
    config, records = make()
    records["a", at(0.1), 2]["status"] = "diverged"
    rows = pick_rates(config, records)
    assert [row.rate for row in rows] == [0.2, 0.1]
    assert rows[0].diverged == (at(0.1),)
    table = to_table(config, rows)
    assert "diverged in some seed and out of the choice: a at 0.1" in table
    for seed in (0, 1, 2):
        records["a", at(0.2), seed]["status"] = "diverged"
    table = to_table(config, pick_rates(config, records))
    (line,) = (line for line in table.splitlines() if line.startswith("| a "))
    assert set(line.split("|")[2].strip()) == {"–"}


def test_numbers_of_the_table():
    config, records = make(target=0.6)
    config.against = "a"
    table = to_table(config, pick_rates(config, records))
    lines = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in table.splitlines()
        if line.startswith("| ")
    }
    head = lines["method"]
    # a at 0.1: tail means 55, 56, 57; b ten points above in every seed
    assert lines["a"][head.index("test accuracy, last 2 (%)")] == "56.00 ± 1.00"
    assert lines["b"][head.index("test accuracy, last 2 (%)")] == "66.00 ± 1.00"
    assert lines["b"][head.index("difference to a [95 %]")] == "+10.00 [+10.00, +10.00]"
    assert lines["a"][head.index("validation, last 2 (%)")] == "70.00 ± 0.00"
    assert lines["a"][head.index("rounds to 60 %")] == "3.0"
    assert lines["b"][head.index("rounds to 60 %")] == "2.0"
    assert lines["a"][head.index("MiB up")] == "2.00"
    assert "40 clients by dirichlet_client (alpha 0.1)" in table
    assert "picked at the end of the grid: a (0.1), b (0.1)" in table


def test_interval_of_the_paired_difference():
    config, records = make()
    for seed, extra in ((0, -0.03), (1, 0.0), (2, 0.03)):
        values = records["b", at(0.1), seed]["rounds"]["test/accuracy"]
        records["b", at(0.1), seed]["rounds"]["test/accuracy"] = [v + extra for v in values]
    table = to_table(config, pick_rates(config, records))
    half = 4.302653 * 3.0 / math.sqrt(3)  # t quantile of two degrees of freedom
    assert f"+10.00 [{10 - half:+.2f}, {10 + half:+.2f}]" in table


def test_targets_that_some_seeds_miss():
    config, records = make(target=0.615)
    table = to_table(config, pick_rates(config, records))
    assert "3.0 (1 of 3 seeds)" in table


def test_unequal_grids_are_said():
    config, records = make()
    config.methods["a"]["lr"] = [0.1]
    assert "unequal tuning: a 1, b 2 rates" in to_table(config, pick_rates(config, records))


def private(pick=None, accuracy=0.5, epsilon=7.03, clip=1.0):
    """A comparison of a private method over rate and clip; ``pick`` is best on validation."""
    config = CompareConfig(
        methods={
            "open": {"algorithm": "fedavg", "lr": [0.1, 0.2, 0.3]},
            "dp": {"algorithm": "dp_fedavg", "lr": [0.1, 0.2, 0.3], "privacy.clip": [0.5, 1, 2]},
        },
        seeds=[0, 1],
        tail=1,
        rounds=1,
        exact_steps=True,
        max_steps=10,
    )
    records = {}
    for cell in config.cells():
        label, point, seed = cell.key
        chosen = dict(point)
        best = (chosen["lr"], chosen.get("privacy.clip", 2.0)) == (pick or (0.2, 2.0))
        records[cell.key] = record([0.9 if best else 0.3], [accuracy], rate=chosen["lr"])
        if label == "dp":
            report = {"epsilon": epsilon - seed, "delta": 0.01, "noise_multiplier": 0.8, "accountant": "PLD"}
            records[cell.key]["privacy"] = {**report, "clip": chosen["privacy.clip"]}
    return config, records


@pytest.mark.parametrize(
    ("pick", "ends"), [((0.2, 1.0), ()), ((0.2, 2.0), ("privacy.clip",)), ((0.1, 0.5), ("lr", "privacy.clip"))]
)
def test_options_are_picked_jointly_and_ends_of_each_grid_are_said(pick, ends):
    config, records = private(pick)
    rows = {row.label: row for row in pick_rates(config, records)}
    assert rows["dp"].point == {"lr": pick[0], "privacy.clip": pick[1]}
    assert (rows["dp"].rate, rows["dp"].of, rows["dp"].edges) == (pick[0], 9, ends)
    table = to_table(config, list(rows.values()))
    names = {"lr": f"lr {pick[0]:g}", "privacy.clip": f"clip {pick[1]:g}"}
    said = f"dp ({', '.join(names[end] for end in ends)})"
    assert (said in table) == bool(ends)
    assert "options with a grid picked jointly on the validation split" in table
    assert "unequal tuning: open 3, dp 9 combinations" in table
    assert "10 local steps each" in table


def test_a_private_comparison_shows_what_is_promised():
    config, records = private()
    lines = rows_of(to_table(config, pick_rates(config, records)))
    head, by_label = lines[0], {line[0]: line for line in lines}
    shown = [by_label["dp"][head.index(name)] for name in ("epsilon", "delta", "sigma", "C")]
    assert shown == ["7.03", "0.01", "0.8", "2"]  # the largest epsilon of any seed
    assert by_label["open"][head.index("epsilon")] == "–"
    assert "clip" not in head
    _, endless = private(epsilon=7.03)
    endless["dp", at(0.2, privacy__clip=2.0), 1]["privacy"]["epsilon"] = "inf"
    table = to_table(config, pick_rates(config, endless))
    assert "| ∞ " in table
    assert "the 18 private runs of this table are not added up" in table


def test_a_diverged_combination_is_named():
    config, records = private()
    records["dp", at(0.3, privacy__clip=2.0), 0]["status"] = "diverged"
    records["dp", at(0.3, privacy__clip=1.0), 1]["status"] = "diverged"
    table = to_table(config, pick_rates(config, records))
    assert "out of the choice: dp at lr 0.3, clip 1; lr 0.3, clip 2" in table


def test_other_options_have_columns_and_ranks_where_they_differ():
    methods = {"a": {"algorithm": "fedprox", "lr": 0.1, "mu": [0.1, 1.0]}, "b": {"algorithm": "fedavg", "lr": 0.1}}
    config = CompareConfig(methods=methods, seeds=[0], tail=1, rounds=1, lora=LoraConfig(ranks=[2, 4]))
    records = {cell.key: record([0.5], [0.5]) for cell in config.cells()}
    for (label, _, _), found in records.items():
        found["settings"] = {"lora": {"ranks": [2, 4] if label == "a" else [4]}}
    lines = rows_of(to_table(config, pick_rates(config, records)))
    head, by_label = lines[0], {line[0]: line for line in lines}
    assert [by_label[label][head.index("mu")] for label in "ab"] == ["0.1", "–"]
    assert [by_label[label][head.index("ranks")] for label in "ab"] == ["2, 4", "4"]


def rows_of(table):
    """Cells of the table by line; the first is the heading."""
    return [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
