"""Our report against mmsegmentation's own metric, on random masks."""

import numpy as np
import pytest
import torch
from css.metrics import class_iou, confusion_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("mmseg")
from css.models.mmseg_ import import_mmseg

IoUMetric = import_mmseg("mmseg.evaluation").IoUMetric


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), channels=st.integers(2, 8), pictures=st.integers(1, 3), ignored=st.booleans())
def test_iou_equals_theirs(seed, channels, pictures, ignored):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, channels, (pictures, 9, 11))
    guesses = np.where(rng.random(labels.shape) < 0.5, labels, rng.integers(0, channels, labels.shape))
    if ignored:
        labels[rng.random(labels.shape) < 0.2] = 255
    ours = class_iou(confusion_matrix(labels, guesses, channels))
    areas = [
        IoUMetric.intersect_and_union(torch.from_numpy(guess), torch.from_numpy(label), channels, 255)
        for guess, label in zip(guesses, labels, strict=True)
    ]
    metrics = IoUMetric.total_area_to_metrics(*(sum(one) for one in zip(*areas, strict=True)), metrics=["mIoU"])
    theirs = np.nan_to_num(metrics["IoU"]) * 100  # a class that occurs nowhere counts 0 with us
    assert np.allclose(ours, theirs, atol=1e-4)
