"""Grouping, refusal to mix, formats."""

import csv
import dataclasses
import io

import pytest
from polymodal.errors import UserError
from polymodal.tables import FORMATS, Measured, build_table, format_difference, format_summary, markdown

M = "test/bleu4"


def run(group, seed, value, **changes):
    return Measured(group, seed, {M: value}, **{"fingerprint": "f1", "source": f"{group}-{seed}", **changes})


def grid(values):
    return [run(group, seed, value) for group, row in values.items() for seed, value in enumerate(row)]


def test_mean_deviation_seeds_and_paired_difference():
    table = build_table(grid({"ssaw": [90.0, 92.0, 94.0], "none": [50.0, 51.0, 52.0]}), [M], against="none")
    ssaw, none = table.rows
    assert (ssaw.summaries[M].mean, ssaw.summaries[M].sd, ssaw.seeds) == (92.0, 2.0, (0, 1, 2))
    assert ssaw.differences[M].mean == 41.0
    # Differences 40, 41, 42: half-width 4.302652... / sqrt(3).
    assert ssaw.differences[M].high == pytest.approx(41 + 2.484138, abs=1e-6)
    assert none.differences == {}


def test_order_of_runs_does_not_change_the_numbers():
    runs = grid({"a": [1.0, 2.0, 4.0], "b": [1.5, 2.5, 3.0]})
    first = build_table(runs, [M], against="a")
    second = build_table(runs[::-1], [M], against="a")
    assert {r.group: r for r in first.rows} == {r.group: r for r in second.rows}


def test_different_data_are_refused_unless_told():
    runs = [run("a", 0, 1.0, data="phoenix"), run("b", 0, 2.0, fingerprint="f2", data="csl")]
    with pytest.raises(UserError, match=r"2 data fingerprints: f1 \(phoenix: 1 run, .*f2 \(csl.*--where.*--mix"):
        build_table(runs, [M])
    table = build_table(runs, [M], mix=True)
    assert table.notes[0].startswith("2 data fingerprints")


def test_different_metric_definitions_are_refused_only_for_metrics_shown():
    runs = [run("a", 0, 1.0, signatures={M: "word"}), run("b", 0, 2.0, signatures={M: "char"})]
    with pytest.raises(UserError, match=r"test/bleu4 has 2 definitions: word \(1 run.*char"):
        build_table(runs, [M])
    assert build_table(runs, ["test/other"]).notes == ()


def test_a_missing_signature_is_not_the_same_as_a_known_one():
    with pytest.raises(UserError, match="2 definitions"):
        build_table([run("a", 0, 1.0, signatures={M: "word"}), run("a", 1, 2.0)], [M])


def test_a_seed_counts_once_and_the_later_run_wins():
    old, new = run("a", 0, 1.0, started="2025-01-01"), run("a", 0, 3.0, started="2025-01-02", source="new")
    table = build_table([new, old], [M])
    assert table.rows[0].summaries[M].mean == 3.0
    assert table.rows[0].sources == ("new",)
    assert table.notes == ("a: 1 older run of the same seed left out",)


def test_several_configurations_in_one_row_are_noted():
    table = build_table([run("a", 0, 1.0, config_hash="x"), run("a", 1, 1.0, config_hash="y")], [M])
    assert table.notes == ("a: 2 different configurations in one row; `--by KEY` separates them",)


def test_values_that_are_not_finite_are_left_out_and_noted():
    table = build_table([run("a", 0, float("nan")), run("a", 1, 2.0)], [M])
    assert table.rows[0].summaries[M].mean == 2.0
    assert table.notes == ("a: test/bleu4 is not finite in 1 of 2 runs; those are left out of it",)


def test_unknown_baseline_names_the_groups():
    with pytest.raises(UserError, match=r"--against c: no such method among the runs; known: a, b"):
        build_table(grid({"a": [1.0], "b": [2.0]}), [M], against="c")


def test_formats_of_numbers():
    table = build_table(grid({"a": [91.234, 93.456], "b": [1.0]}), [M, "test/nll"], against="b")
    a, b = table.rows
    assert format_summary(M, a.summaries[M]) == "92.34 ± 1.57"
    assert format_summary(M, b.summaries[M]) == "1.00"
    assert format_summary("test/nll", a.summaries.get("test/nll")) == "–"
    assert format_summary("test/ece", dataclasses.replace(b.summaries[M], mean=0.01234)) == "0.0123"
    assert format_summary("perf/step_ms", dataclasses.replace(b.summaries[M], mean=5123.4)) == "5123"
    assert format_difference(M, a.differences[M]) == "+90.23"
    assert format_difference(M, None) == "–"


def test_markdown_is_aligned_and_escapes_bars():
    text = markdown(["name", "value"], [["a|b", "1.5"], ["c", "10.25"]])
    assert text.splitlines() == ["| name | value |", "| ---- | ----: |", r"| a\|b |   1.5 |", "| c    | 10.25 |"]


def test_markdown_report():
    table = build_table(grid({"ssaw": [90.0, 92.0], "none": [50.0, 51.0]}), [M], title="slt", against="none")
    lines = FORMATS["md"]([table]).splitlines()
    assert lines[0] == "### slt"
    assert "| ssaw   | –        |     2 | 91.00 ± 1.41 |" in lines
    assert "| ssaw          |     2 | +40.50 [+34.15, +46.85] |" in lines


def test_csv_is_tidy_and_keeps_full_precision():
    table = build_table(grid({"a": [1 / 3, 2 / 3], "b": [0.1, 0.2]}), [M], title="t", against="b")
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"]([table, table]))))
    assert len(rows) == 4
    assert rows[0]["group"] == "a"
    assert float(rows[0]["mean"]) == table.rows[0].summaries[M].mean
    assert float(rows[0]["low"]) == table.rows[0].differences[M].low
    assert (rows[1]["group"], rows[1]["difference"]) == ("b", "")


def test_tex_escapes_what_latex_reads():
    table = build_table(grid({"cross_attention": [1.0, 2.0]}), [M])
    assert r"cross\_attention & -- & 2 & 1.50 $\pm$ 0.71 \\" in FORMATS["tex"]([table]).splitlines()
