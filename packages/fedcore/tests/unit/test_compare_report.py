"""Picking and the table, on made-up records whose means and intervals are known."""

import math

import pytest
from fedcore.compare_report import pick_rates, tail_mean, to_table
from fedcore.compare_settings import CompareConfig


def record(val, test, status="finished", rate=0.1):
    rounds = list(range(1, len(test) + 1))
    metrics = {"test/accuracy": test[-1], "comm/up_bytes_total": 2.0**21, "comm/down_bytes_total": 2.0**20}
    return {
        "status": status,
        "rate": rate,
        "seconds": 1.5,
        "metrics": metrics,
        "rounds": {"round": rounds, "val/accuracy": val, "test/accuracy": test},
    }


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
            records[label, 0.1, seed] = record([0.1, 0.7, 0.7], [0.2, 0.5 + lift + up, 0.6 + lift + up], rate=0.1)
            records[label, 0.2, seed] = record([0.1, 0.6, 0.6], [0.2, 0.7 + lift, 0.8 + lift + up], rate=0.2)
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
    records["a", 0.1, 2]["status"] = "diverged"
    rows = pick_rates(config, records)
    assert [row.rate for row in rows] == [0.2, 0.1]
    assert rows[0].diverged == (0.1,)
    table = to_table(config, rows)
    assert "diverged in some seed and out of the choice: a at 0.1" in table
    for seed in (0, 1, 2):
        records["a", 0.2, seed]["status"] = "diverged"
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
        values = records["b", 0.1, seed]["rounds"]["test/accuracy"]
        records["b", 0.1, seed]["rounds"]["test/accuracy"] = [v + extra for v in values]
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
