"""Metrics and temperatures: invariants, degenerate sets, errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from missing_modal.calibration import HIGHEST, LOWEST, Temperatures, fit_temperature, fit_temperatures
from missing_modal.metrics import mean_by_row, probabilities, report, score_samples, summarise
from polymodal.errors import UserError

TASKS = ("multiclass", "binary", "multilabel")


def world(seed, task, count=30):
    rng = np.random.default_rng(seed)
    classes = 2 if task == "binary" else 4
    logits = rng.normal(size=(count, classes))
    if task == "multilabel":
        return logits, (rng.random((count, classes)) < 0.4).astype(np.float32)
    return logits, rng.integers(0, classes, count)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(TASKS), st.floats(0.1, 10), st.integers(1, 40))
def test_temperature_changes_no_decision(seed, task, temperature, count):
    logits, labels = world(seed, task, count)
    before, after = (summarise(score_samples(z, labels, task)) for z in (logits, logits / temperature))
    for name in ("accuracy", "f1_macro", "f1_micro", "f1_samples", "f1_weighted", "auroc"):
        assert before.get(name) == pytest.approx(after.get(name), nan_ok=True)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(TASKS))
def test_order_of_samples_does_not_matter(seed, task):
    logits, labels = world(seed, task)
    masks = np.random.default_rng(seed).integers(1, 4, len(logits))
    order = np.random.default_rng(seed + 1).permutation(len(logits))
    first = report(logits, labels, masks, task)
    assert report(logits[order], labels[order], masks[order], task) == pytest.approx(first, abs=1e-12, nan_ok=True)


def test_tensors_of_any_dtype():
    logits, labels = world(0, "multiclass")
    bf16 = torch.from_numpy(logits).bfloat16()
    assert summarise(score_samples(bf16, torch.from_numpy(labels), "multiclass")) == summarise(
        score_samples(bf16.double().numpy(), labels, "multiclass")
    )


def test_large_logits_stay_finite():
    for task, labels, nll in (("binary", [1, 0], 2e4), ("multilabel", [[0, 1], [1, 0]], 1e4)):
        found = summarise(score_samples([[1e4, -1e4], [-1e4, 1e4]], labels, task))
        assert found["nll"] == pytest.approx(nll)
        assert all(math.isfinite(value) for value in found.values())
    # Both certain of class 1, one more than the other: no tie although both softmax values round to 1.
    assert summarise(score_samples([[0, 50], [0, 90]], [0, 1], "binary"))["auroc"] == 1.0


def test_what_is_not_defined():
    found = report(np.zeros((2, 2)), [1, 1], [3, 1], "binary")
    assert math.isnan(found["test/auroc"])
    assert "test/auroc/complete" not in found
    assert found["test/accuracy/image"] == 0.0
    assert "test/accuracy/text" not in found
    empty = summarise(score_samples(np.zeros((0, 3)), np.zeros(0, dtype=int), "multiclass"))
    assert all(math.isnan(value) for value in empty.values())


def test_confidences_on_a_border_belong_to_the_bin_below():
    """Bins are (low, high]: 3/15 is in the third, not in the fourth."""
    found = {count: score_samples(np.zeros((1, count)), [0], "multiclass") for count in (3, 5, 15)}
    exact = {count: scores for count, scores in found.items() if scores.confidence[0] * 15 == 15 // count}
    assert exact, "1 / 3, 1 / 5 and 1 / 15 are all rounded here: choose other logits"
    for count, scores in exact.items():
        assert scores.bins.tolist() == [15 // count - 1]
    assert score_samples([[900.0, 0.0]], [0], "binary").bins.tolist() == [14]


def test_half_is_a_yes():
    assert score_samples([[0.0, -1e-9]], [[1, 1]], "multilabel").predicted.tolist() == [[True, False]]


def test_errors():
    with pytest.raises(UserError, match="not finite"):
        score_samples([[0.0, float("nan")]], [0], "multiclass")
    with pytest.raises(ValueError, match=r"0\.\.2"):
        score_samples(np.zeros((2, 3)), [0, 3], "multiclass")
    with pytest.raises(ValueError, match="two outputs"):
        score_samples(np.zeros((1, 1)), [0], "binary")
    with pytest.raises(ValueError, match="expected \\(N, C\\)"):
        score_samples(np.zeros((2, 3)), [0, 1], "multilabel")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(TASKS), st.floats(0.1, 30))
def test_mean_by_row_averages_probabilities(seed, task, scale):
    logits, _ = world(seed, task, 12)
    logits *= scale
    rows = [f"r{number}" for number in np.random.default_rng(seed).integers(0, 5, 12)]
    names, means = mean_by_row(logits, rows, task)
    assert names == list(dict.fromkeys(rows))
    p = probabilities(logits, task)
    expected = np.stack([p[[row == name for row in rows]].mean(axis=0) for name in names])
    np.testing.assert_allclose(probabilities(means, task), expected, atol=1e-12)


def test_mean_of_one_sample_is_itself():
    logits, _ = world(1, "multilabel", 6)
    _, means = mean_by_row(logits * 200, map(str, range(6)), "multilabel")
    np.testing.assert_allclose(means, logits * 200, atol=1e-9)


# ------------------------------------------------------------------ temperatures


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(TASKS), st.floats(0.05, 20))
def test_fitted_temperature_is_no_worse_than_others(seed, task, scale):
    logits, labels = world(seed, task, 60)
    logits = scale * logits
    found = fit_temperature(logits, labels, task)
    assert LOWEST <= found <= HIGHEST
    best = summarise(score_samples(logits / found, labels, task))["nll"]
    for other in (LOWEST, 0.1, 0.5, found * 0.98, found * 1.02, 1.0, 3.0, 20.0, HIGHEST):
        if LOWEST <= other <= HIGHEST:
            assert best <= summarise(score_samples(logits / other, labels, task))["nll"] + 1e-9


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_all_right_and_all_wrong_end_at_the_bounds(scale):
    # All right: T -> 0, though the NLL is flat before the bound; all wrong: T -> infinity.
    logits = scale * np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    right = fit_temperature(logits, [0, 1, 0], "binary")
    assert LOWEST <= right < 0.1 * scale
    assert summarise(score_samples(logits / right, [0, 1, 0], "binary"))["nll"] < 1e-8
    assert fit_temperature(logits, [1, 0, 1], "binary") == pytest.approx(HIGHEST)


def test_nothing_to_fit():
    assert fit_temperature(np.zeros((4, 3)), [0, 1, 2, 0], "multiclass") == pytest.approx(1.0)
    assert fit_temperature(np.zeros((0, 3)), np.zeros(0, dtype=int), "multiclass") == 1.0


def test_a_pattern_with_few_rows_takes_the_pooled_temperature():
    logits, labels = world(3, "multiclass", 180)
    labels = np.where(np.arange(180) % 3 > 0, logits.argmax(axis=1), labels)
    masks = np.repeat([3, 1, 2], [100, 50, 30])
    logits[masks == 1] *= 6
    found = fit_temperatures(logits, labels, masks, "multiclass")
    assert found.pooled == fit_temperature(logits, labels, "multiclass")
    assert found.by_mask[2] == found.pooled
    assert found.rows == {3: 100, 1: 50, 2: 30}
    for mask in (3, 1):
        assert found.by_mask[mask] == fit_temperature(logits[masks == mask], labels[masks == mask], "multiclass")
        assert found.by_mask[mask] != found.pooled
    before, after = (report(z, labels, masks, "multiclass") for z in (logits, found.scale(logits, masks)))
    assert after["test/nll/image"] < before["test/nll/image"]
    assert after["test/accuracy"] == before["test/accuracy"]


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_a_pattern_whose_rows_are_all_right_takes_the_pooled_temperature(task):
    """The likelihood has no maximum there; a temperature at the bound would make one wrong test row very costly."""
    rng = np.random.default_rng(0)
    logits, masks = rng.normal(size=(160, 3)) * 3, np.array([3, 1] * 80)
    labels = (logits > 0).astype(int) if task == "multilabel" else logits.argmax(1)
    wrong = np.flatnonzero(masks == 1)[::4]
    labels[wrong] = 1 - labels[wrong] if task == "multilabel" else (labels[wrong] + 1) % 3
    found = fit_temperatures(logits, labels, masks, task)
    assert found.by_mask[3] == found.pooled == fit_temperature(logits, labels, task)
    assert found.by_mask[1] == fit_temperature(logits[masks == 1], labels[masks == 1], task) > found.pooled
    right = masks == 3
    assert fit_temperatures(logits[right], labels[right], masks[right], task).pooled == 1.0


def test_temperatures_as_json():
    first = Temperatures({7: 1.25, 3: 0.5}, 2.0, ("image", "text", "audio"))
    plain = first.to_json()
    assert plain == {"pooled": 2.0, "patterns": {"complete": 1.25, "image+text": 0.5}}
    second = Temperatures.from_json(plain, first.modalities)
    assert (second.by_mask, second.pooled) == (first.by_mask, first.pooled)
    np.testing.assert_array_equal(second.of([7, 3, 1]), [1.25, 0.5, 2.0])
    np.testing.assert_array_equal(second.scale([[1.0], [1.0]], [3, 1]), [[2.0], [0.5]])
    for bad in (
        {},
        [],
        {"pooled": 0, "patterns": {}},
        {"pooled": 1, "patterns": {"image": "x"}},
        {"pooled": 1, "patterns": {"smell": 1}},
    ):
        with pytest.raises(UserError):
            Temperatures.from_json(bad)
