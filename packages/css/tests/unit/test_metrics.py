"""Confusion matrix, IoU, report, forgetting: against sets of pixels, numbers by hand, and mmsegmentation."""

import importlib.util
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from css.metrics import (
    add_sparse,
    average_over_steps,
    class_iou,
    confusion_matrix,
    forgetting,
    mean_forgetting,
    segmentation_report,
    sparse_confusion,
)
from hypothesis import given, settings
from hypothesis import strategies as st

_path = Path(__file__).parents[1] / "golden" / "_reference.py"
_spec = importlib.util.spec_from_file_location("css_reference", _path)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


def world(seed, channels, shape=(3, 8, 9)):
    """Truth with ignored pixels, and predictions that are often right."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([*range(channels), 255], size=shape).astype(np.uint8)
    guess = rng.integers(0, channels, size=shape).astype(np.uint8)
    return truth, np.where((rng.uniform(size=shape) < 0.5) & (truth != 255), truth, guess)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_confusion_matrix(seed, channels):
    truth, guess = world(seed, channels)
    found = confusion_matrix(truth, guess, channels)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, reference.confusion(truth, guess, channels))
    assert found.sum() == (truth != 255).sum()
    for kind in (torch.uint8, torch.int64):
        tensors = (torch.from_numpy(x).to(kind) for x in (truth, guess))
        np.testing.assert_array_equal(confusion_matrix(*tensors, channels), found)


def test_rows_are_the_truth():
    assert confusion_matrix([0, 0, 1, 255], [1, 1, 0, 1], 2).tolist() == [[0, 2], [1, 0]]


def test_predictions_where_the_truth_is_ignored_do_not_matter():
    assert confusion_matrix([255, 1], [200, 1], 2).tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize(
    ("truth", "guess", "message"),
    [
        ([0, 3], [0, 0], r"labels are 0\.\.3 .* expected 0\.\.2"),
        ([0, 1], [0, 255], r"predictions are 0\.\.255 .* expected 0\.\.2"),
        ([0, 1], [-1, 0], r"predictions are -1\.\.0"),
        ([0, 1], [0], "expected the same shape"),
    ],
)
def test_channels_out_of_range_are_refused(truth, guess, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(truth), np.array(guess), 3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_records_of_pictures_add_up(seed, channels):
    truth, guess = world(seed, channels)
    total = np.zeros((channels, channels), dtype=np.int64)
    for one, other in zip(truth, guess, strict=True):
        record = pickle.loads(pickle.dumps(sparse_confusion(one, other, channels)))
        assert (record.counts > 0).all()
        assert add_sparse(total, record) is total
    np.testing.assert_array_equal(total, confusion_matrix(truth, guess, channels))


def test_a_record_is_small():
    truth = np.zeros((512, 512), dtype=np.uint8)
    truth[:100] = 150
    assert len(pickle.dumps(sparse_confusion(truth, truth, 151))) < 1000  # the matrix takes 182 kB
    with pytest.raises(ValueError, match="record of 151 channels"):
        add_sparse(np.zeros((150, 150), dtype=np.int64), sparse_confusion(truth, truth, 151))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4))
def test_report(seed, base, later):
    channels = 1 + base + later
    truth, guess = world(seed, channels)
    confusion = confusion_matrix(truth, guess, channels)
    first, second = list(range(1, base + 1)), list(range(base + 1, channels))
    expected = reference.report(truth, guess, first, second)
    found = segmentation_report(confusion, base, later)
    for name in ("old", "new", "all", "harmonic"):
        assert found[name] == pytest.approx(expected[name], rel=1e-12)
    assert found["classes"] == pytest.approx([expected["iou"][c] for c in range(channels)], rel=1e-12)
    assert segmentation_report(confusion, first, iter(second)) == found
    assert segmentation_report(torch.from_numpy(confusion), base, later) == found
    json.dumps(found, allow_nan=False)


def test_report_by_hand():
    # Background 6/8, class 1: 1/3, class 2 (later): 2/4, class 3 (later): never seen, never found.
    confusion = np.array([[6, 1, 1, 0], [0, 1, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]])
    found = segmentation_report(confusion, 1, 2)
    assert found["classes"] == pytest.approx([75.0, 100 / 3, 50.0, 0.0])
    assert found["old"] == pytest.approx((75 + 100 / 3) / 2)
    assert found["new"] == pytest.approx(25.0)
    assert found["all"] == pytest.approx((75 + 100 / 3 + 50) / 4)
    assert found["harmonic"] == pytest.approx(2 * found["old"] * 25 / (found["old"] + 25))
    # Any subset, in any order: class 2 first, class 1 later.
    chosen = segmentation_report(confusion, [2], [1])
    assert (chosen["old"], chosen["new"]) == pytest.approx((62.5, 100 / 3))
    assert chosen["all"] == pytest.approx((75 + 100 / 3 + 50) / 3)


def test_report_without_later_classes_and_without_hits():
    found = segmentation_report(np.diag([4, 5, 0]), 2, 0)
    assert found["old"] == found["all"] == pytest.approx(200 / 3)
    assert math.isnan(found["new"])
    assert math.isnan(found["harmonic"])
    assert segmentation_report(np.array([[4, 0], [5, 0]]), 0, 1)["harmonic"] == 0.0
    assert segmentation_report(np.zeros((3, 3)), 1, 1)["harmonic"] == 0.0


@pytest.mark.parametrize(
    ("base", "later"), [(2, 2), ([1, 1], [2]), ([1, 2], [2, 3]), ([0], [1]), (1, [4]), ([-1], [1])]
)
def test_classes_that_do_not_fit_are_refused(base, later):
    with pytest.raises(ValueError, match=r"expected different channels in 1\.\.3"):
        segmentation_report(np.eye(4), base, later)


def test_iou_wants_a_square():
    with pytest.raises(ValueError, match=r"expected \(S, S\)"):
        class_iou(np.zeros((2, 3)))


def test_forgetting():
    history = [[90.0, 80.0, 70.0], [95.0, 85.0, 40.0, 60.0], torch.tensor([92.0, 50.0, 45.0, 66.0, 10.0])]
    # The best of all earlier steps counts; a class that got better has lost less than nothing.
    assert forgetting(history).tolist() == pytest.approx([3.0, 35.0, 25.0, -6.0])
    assert mean_forgetting(history) == pytest.approx((35 + 25 - 6) / 3)
    assert forgetting(history[:1]).tolist() == []
    assert mean_forgetting(history[:1]) == 0.0
    for wrong in ([], [[1.0, 2.0], [1.0]]):
        with pytest.raises(ValueError, match="expected at least one step"):
            forgetting(wrong)


def test_average_over_steps():
    reports = [segmentation_report(np.diag([4, 5]), 1, 0), segmentation_report(np.array([[4, 0], [5, 0]]), 1, 0)]
    assert average_over_steps(reports) == pytest.approx((100 + 200 / 9) / 2)
    assert average_over_steps([50.0, 20.0]) == 35.0
    with pytest.raises(ValueError, match="no step"):
        average_over_steps([])


def test_metrics_need_no_torch():
    code = "import sys, css.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("seed", range(4))
def test_mmsegmentation_agrees(seed):
    evaluation = pytest.importorskip("mmseg.evaluation")
    channels, base = 7, 4
    truth, guess = world(seed, channels, (5, 16, 17))
    if seed % 2:  # a class that occurs nowhere: theirs is nan and left out of the mean, ours is 0
        truth[truth == 6], guess[guess == 6] = 0, 5
    theirs = evaluation.IoUMetric(ignore_index=255, iou_metrics=["mIoU"])
    theirs.dataset_meta = {"classes": [str(c) for c in range(channels)]}
    for one, other in zip(truth, guess, strict=True):
        sample = {"pred_sem_seg": {"data": torch.from_numpy(other)[None]}}
        sample["gt_sem_seg"] = {"data": torch.from_numpy(one)[None]}
        theirs.process({}, [sample])
    areas = [sum(parts) for parts in zip(*theirs.results, strict=True)]
    values = theirs.total_area_to_metrics(*areas, metrics=["mIoU"])["IoU"]
    found = segmentation_report(confusion_matrix(truth, guess, channels), base, channels - 1 - base)
    np.testing.assert_allclose(found["classes"], 100 * np.nan_to_num(values), rtol=1e-5)
    assert np.isnan(values).sum() == seed % 2
    if not seed % 2:
        assert found["all"] == pytest.approx(theirs.compute_metrics(theirs.results)["mIoU"], abs=0.006)
