"""What the committed results of the small experiments say, and that tables are written from them."""

import json
from pathlib import Path

import pytest
from fedcore.compare_cell import CellRunner
from fedcore.compare_report import pick_rates, tail_mean, to_table
from fedcore.compare_screen import missing_cells
from fedcore.compare_settings import CompareConfig
from fedcore.data import READERS
from polymodal.cli import parse_config

FOLDER = Path(__file__).parents[2] / "experiments"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="experiments are not part of the installed package")
ON_DIGITS = ("fedswa_e10", "fedswa_e5", "fedadamw", "fedadamw_seeds", "fedmuon", "rivals", "rivals_adaptive")


def load(name):
    config = parse_config(CompareConfig, ["--config", str(FOLDER / f"{name}.yaml")], choices={"data": READERS})
    runner = CellRunner(config)
    records = {}
    missing = missing_cells(config, records, lambda cell: runner.read(FOLDER / "results" / name, cell))
    assert not missing, f"{name}/{missing[0].name} is missing or of other settings: run fed-compare"
    return config, records


def done(name):
    """Whether an experiment has been run to its end."""
    return (FOLDER / "results" / name / "table.md").is_file()


def by_label(config, rows):
    """Label -> accuracy in percent by seed."""
    return {
        row.label: {s: 100 * tail_mean(r, "test/accuracy", config.tail) for s, r in row.records.items()} for row in rows
    }


@pytest.fixture(scope="module")
def digits():
    """Results by experiment: label -> accuracy in percent by seed."""
    found = {}
    for name in ON_DIGITS:
        config, records = load(name)
        rows = pick_rates(config, records)
        assert to_table(config, rows) == (FOLDER / "results" / name / "table.md").read_text(encoding="utf-8")
        found[name] = by_label(config, rows)
    return found


def gain(table, method, baseline):
    """Mean difference over seeds, and the smallest of any seed."""
    differences = [table[method][seed] - table[baseline][seed] for seed in table[method]]
    return sum(differences) / len(differences), min(differences)


def test_tables_are_written_from_the_committed_cells(digits):
    assert all(len(by_seed) >= 3 for table in digits.values() for by_seed in table.values())


def test_fedmoswa_beats_fedavg_by_two_points_at_ten_epochs(digits):
    mean, least = gain(digits["fedswa_e10"], "fedmoswa", "fedavg")
    assert mean > 2
    assert least > 0


def test_fedadamw_beats_local_adamw_by_four_points(digits):
    for name in ("fedadamw", "fedadamw_seeds"):
        assert gain(digits[name], "fedadamw", "local_adamw")[0] >= 4
    # block means lose little against the whole v
    assert gain(digits["fedadamw"], "fedadamw", "full")[0] >= -2


def test_fedmuon_beats_fedavg_and_local_muon(digits):
    assert gain(digits["fedmuon"], "fedmuon", "fedavg")[0] >= 2
    mean, least = gain(digits["fedmuon"], "fedmuon", "local_muon")
    assert mean >= 15
    assert least > 0


@pytest.mark.parametrize("name", [n for n in ("ilora_3_03", "ilora_3_01", "ilora_10_03", "ilora_10_01") if done(n)])
def test_adapters_learn_more_than_a_head_alone(name):
    """No ranking is asserted: which method is ahead changes with the setting."""
    config, records = load(name)
    rows = pick_rates(config, records)
    assert to_table(config, rows) == (FOLDER / "results" / name / "table.md").read_text(encoding="utf-8")
    table = by_label(config, rows)
    for label in ("fedit", "flexlora", "flora", "ilora_drop", "ilora_fold"):
        assert gain(table, label, "lora_head")[0] > 5, label


@pytest.mark.parametrize(("name", "epsilon"), [row for row in (("dp_100", 7.03), ("dp_1000", 1.58)) if done(row[0])])
def test_private_methods_learn_at_the_epsilon_of_the_specification(name, epsilon):
    """No ranking among private methods is asserted."""
    config, records = load(name)
    rows = pick_rates(config, records)
    assert to_table(config, rows) == (FOLDER / "results" / name / "table.md").read_text(encoding="utf-8")
    table = by_label(config, rows)
    for row in rows:
        for record in row.records.values():
            if row.label == "not_private":
                assert "privacy" not in record
                continue
            report = record["privacy"]
            assert report["epsilon"] == pytest.approx(epsilon, rel=0.01)
            assert (report["releases"], report["sampling"], report["reasons"]) == (40, "poisson", [])
        assert sum(table[row.label].values()) / len(row.records) > 20, row.label  # chance: 10
        assert gain(table, row.label, "not_private")[0] < 2, row.label


def test_no_result_names_a_folder_of_a_machine():
    for path in FOLDER.glob("results/*/*.json"):
        text = path.read_text(encoding="utf-8")
        assert '"/' not in text, path
        assert json.loads(text)["status"] in ("finished", "diverged")
