"""Settings, tables and pictures of mm-matrix from records made by hand."""

import dataclasses

import pytest
from missing_modal.calibration import Temperatures
from missing_modal.figures import heat_map, rate_curves, reliability
from missing_modal.matrix_report import draw, label_of, scores, to_tables
from missing_modal.matrix_settings import MatrixConfig, Trial, digest_of
from missing_modal.records import Packed
from missing_modal.settings import MMConfig
from missing_modal.world import World
from polymodal.errors import UserError

PNG = b"\x89PNG"
RATIOS = [0.0, 0.7, 1.0]


def value_of(method, kind, test, ratio, seed, table):
    """A made-up accuracy, exact in binary."""
    return (
        0.5
        + (0.125 if method == "dcp" else 0.0)
        + (0.0625 if kind == test else 0.0)
        - ratio / 8
        + seed / 64
        + table / 128
    )


def record(method, kind, seed, undefined=()):
    cells = {"kind": [], "ratio": [], "seed": [], "test/accuracy": [], "test/nll": []}
    for test in ("image", "both"):
        for ratio in RATIOS:
            for table in (0, 1):
                cells["kind"].append(test)
                cells["ratio"].append(ratio)
                cells["seed"].append(table)
                value = value_of(method, kind, test, ratio, seed, table)
                cells["test/accuracy"].append(None if (test, ratio) in undefined else value)
                cells["test/nll"].append(1.5)
    return {
        "method": method,
        "train": {"kind": kind, "ratio": 0.7, "seed": seed},
        "samples": 1234,
        "seconds": {"train": 1.0, "passes": 2.0, "lookups": 0.5},
        "cells": cells,
    }


def config(**changed):
    given = {"train_kinds": ["image", "both"], "test_ratios": RATIOS, "test_seeds": [0, 1], "seeds": [0, 1], **changed}
    return MatrixConfig(**given)


@pytest.fixture
def records():
    return [record(m, kind, seed) for seed in (0, 1) for m in ("dcp", "msp") for kind in ("image", "both")]


def test_scores_are_means_over_tables_by_seed_in_percent(records):
    found = scores(records, "test/accuracy")
    assert set(found) == {
        (f"{m}: {k}", t, r)
        for m in ("dcp", "msp")
        for k in ("image", "both")
        for t in ("image", "both")
        for r in RATIOS
    }
    # 0.5 + 0.125 + 0.0625 - 0.7 / 8 + seed / 64 + mean of 0 and 1 / 128
    assert found["dcp: image", "image", 0.7] == pytest.approx({0: 60.390625, 1: 61.953125})
    assert scores(records, "test/nll")["msp: both", "image", 1.0] == {0: 1.5, 1: 1.5}


def test_the_tables_say_mean_deviation_and_paired_difference(records):
    text = to_tables(config(methods=["dcp", "msp"], name="mine"), records)
    assert "### mine: test/accuracy on world" in text
    # seeds 0 and 1 differ by 1.5625 points: deviation 1.5625 / sqrt(2)
    assert "61.17 ± 1.10" in text
    line = next(line for line in text.splitlines() if line.startswith("| msp: image") and "[" in line)
    assert line.count("-12.50 [-12.50, -12.50]") == 2
    assert "the highest mean at 70 %, by what lacks in the test: image: dcp: image; both: dcp: both" in text
    assert "training seeds 0, 1" in text
    assert "96 cells looked up in 4.0 s; the passes they are looked up in took 16.0 s" in text


def test_one_seed_has_no_deviation_and_says_so():
    text = to_tables(config(seeds=[0]), [record("dcp", kind, 0) for kind in ("image", "both")])
    assert "±" not in text
    assert "one training seed (0), hence no deviations" in text
    assert "Difference" not in text


def test_cells_without_a_score_are_dashes():
    lost = [record("dcp", kind, seed, undefined={("both", 0.7)}) for seed in (0, 1) for kind in ("image", "both")]
    text = to_tables(config(), lost)
    row = next(line for line in text.splitlines() if line.startswith("| image"))
    assert row.count("–") == 2  # the cell and the mean over test kinds


def test_labels_say_only_what_differs():
    one, other = record("dcp", "image", 0), record("dcp", "both", 0)
    assert label_of(one, [one, other]) == "image"
    other["train"]["ratio"] = 0.3
    assert label_of(other, [one, other]) == "both 30 %"
    assert label_of(one, [one, record("msp", "image", 0)]) == "dcp: image"


def test_an_unknown_score_names_those_that_there_are(records):
    with pytest.raises(UserError, match="known: accuracy, nll"):
        to_tables(config(metric="f1_macro", methods=["dcp", "msp"]), records)


def test_pictures_are_written(records, tmp_path):
    files = draw(config(methods=["dcp", "msp"]), records, tmp_path)
    assert [path.name for path in files] == ["heat_map.png", "curves.png"]
    assert all(path.read_bytes().startswith(PNG) for path in files)


def test_curves_have_a_row_a_training_pattern_and_a_line_a_method(records, tmp_path, monkeypatch):
    import missing_modal.figures as figures

    seen = {}
    monkeypatch.setattr(figures, "rate_curves", lambda panels, **_: seen.update(panels) or PNG)
    draw(config(methods=["dcp", "msp"]), records, tmp_path)
    assert set(seen) == {(row, column) for row in ("image", "both") for column in ("image", "both")}
    assert all(list(lines) == ["dcp", "msp"] for lines in seen.values())
    seen.clear()
    draw(config(), [one for one in records if one["method"] == "dcp"], tmp_path)
    assert {key: list(lines) for key, lines in seen.items()} == {
        ("", "image"): ["image", "both"], ("", "both"): ["image", "both"],
    }  # fmt: skip


def test_pictures_of_nothing_are_refused():
    with pytest.raises(UserError, match="no cell to draw"):
        heat_map({}, {})
    with pytest.raises(UserError, match="no curve to draw"):
        rate_curves({("", "both"): {}}, y_label="accuracy")
    assert heat_map({("a", "b"): 1.0}, {("a", "b"): None}).startswith(PNG)


def test_reliability_of_each_task():
    import numpy as np

    rng = np.random.default_rng(0)
    masks = rng.integers(1, 4, 40)
    several = Packed([str(i) for i in range(40)], rng.normal(size=(40, 3)), rng.integers(0, 2, (40, 3)), masks)
    single = dataclasses.replace(several, labels=rng.integers(0, 3, 40))
    for packed, task in ((several, "multilabel"), (single, "multiclass")):
        assert reliability(packed, Temperatures({3: 2.0}, 1.5), task).startswith(PNG)
        assert reliability(packed, None, task).startswith(PNG)


# ------------------------------------------------------------------ settings


def test_the_grid_of_the_default():
    made = MatrixConfig()
    assert [trial.kind for trial in made.trials()] == ["image", "text", "both"]
    assert {(trial.method, trial.ratio, trial.seed) for trial in made.trials()} == {("dcp", 0.7, 0)}
    assert made.shown_at == 0.7
    assert made.tested() == [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]


def test_a_complete_training_is_one_model_whatever_the_rates():
    made = config(train_kinds=["none", "both"], train_ratios=[0.3, 0.7], seeds=[4])
    assert made.trials() == [
        Trial("dcp", "none", 0.0, 4),
        Trial("dcp", "both", 0.3, 4),
        Trial("dcp", "both", 0.7, 4),
    ]
    assert made.shown_at == 0.3
    assert config(at=0.25).tested() == [0.0, 0.25, 0.7, 1.0]


def test_a_model_trains_with_its_own_tables_and_seed(tmp_path):
    made = config(methods=["dcp", "msp"], method_options={"length": 6}, results=tmp_path)
    run = made.training(Trial("msp", "image", 0.5, 3))
    assert isinstance(run, MMConfig)
    assert (run.method, run.seed, run.missing.kind, run.missing.ratio, run.missing.seed) == ("msp", 3, "image", 0.5, 3)
    assert run.method_options == {}  # those of method, which is dcp
    assert made.training(Trial("dcp", "image", 0.5, 3)).method_options == {"length": 6}
    assert run.out == tmp_path / "models"
    assert run.log.wandb == "off"


def test_what_changes_a_model_changes_its_digest(tmp_path):
    told = {"fingerprint": "abc"}
    base = digest_of(config().training(Trial("dcp", "both", 0.7, 0)), told)
    same = digest_of(config(results=tmp_path, jobs=2, threads=2).training(Trial("dcp", "both", 0.7, 0)), told)
    assert base == same
    others = {
        digest_of(config().training(Trial("dcp", "both", 0.7, 1)), told),
        digest_of(config().training(Trial("dcp", "both", 0.5, 0)), told),
        digest_of(config(method_options={"length": 9}).training(Trial("dcp", "both", 0.7, 0)), told),
        digest_of(config(data=World(noise=0.5)).training(Trial("dcp", "both", 0.7, 0)), told),
        digest_of(config().training(Trial("dcp", "both", 0.7, 0)), {"fingerprint": "abd"}),
    }
    assert len(others | {base}) == 6


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": [1, 1]}, "none of them twice"),
        ({"test_ratios": []}, "expected at least one"),
        ({"train_ratios": [1.5]}, "shares from 0 to 1"),
        ({"at": -0.1}, "from 0 to 1"),
        ({"jobs": 0}, "at least 1"),
        ({"test_seeds": [-1]}, "seeds below 0"),
        ({"resume": "auto"}, "goes on by itself"),
    ],
    ids=str,
)
def test_options_out_of_range(changed, message):
    with pytest.raises(UserError, match=message):
        config(**changed)


def test_unknown_names_are_told_with_the_known_ones():
    with pytest.raises(UserError, match="did you mean"):
        config(train_kinds=["imag"]).trials()
    with pytest.raises(UserError, match="dcp"):
        config(methods=["dpc"]).trials()
    with pytest.raises(UserError, match="methods are dcp, msp"):
        config(methods=["dcp", "msp"], against="vpt").rows()
    with pytest.raises(UserError, match="none of them twice"):
        config(train_kinds=["image", "only:image"]).trials()
