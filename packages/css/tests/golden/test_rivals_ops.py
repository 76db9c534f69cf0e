"""Functions behind MiB, PLOP and DKD against slow float64 references."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from css.ops.decomposed import class_targets, classwise_bce, decompose, distil_binary
from css.ops.entropy import entropy_histogram, entropy_pseudo_label, median_thresholds, normalised_entropy
from css.ops.pod import fold_new, local_pod, pod_distance
from css.ops.softmax import softmax_loss

_spec = importlib.util.spec_from_file_location("css_rivals_reference", Path(__file__).with_name("_rivals_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


def _logits(seed, *shape, scale=3.0):
    return np.random.default_rng(seed).normal(size=shape) * scale


def _labels(seed, *shape, channels):
    labels = np.random.default_rng(seed).integers(0, channels, shape)
    labels[:, 0, :2] = 255
    return labels


@pytest.mark.parametrize("background", [1, 2, 4, 6])
def test_softmax_loss(background):
    logits, labels = _logits(1, 2, 6, 5, 4, scale=8.0), _labels(2, 2, 5, 4, channels=6)
    for factor in (None, np.array([0.25, 1.0])):
        given = None if factor is None else torch.from_numpy(factor)
        found = softmax_loss(torch.from_numpy(logits), torch.from_numpy(labels), background, given)
        assert found.item() == pytest.approx(reference.cross_entropy(logits, labels, background, factor), abs=1e-10)


def test_normalised_entropy():
    logits = _logits(3, 2, 4, 3, 5)
    found, classes = normalised_entropy(torch.from_numpy(logits))
    for b, i, j in np.ndindex(2, 3, 5):
        assert found[b, i, j].item() == pytest.approx(reference.entropy(logits[b, :, i, j]), abs=1e-12)
        assert classes[b, i, j] == np.argmax(logits[b, :, i, j])


@pytest.mark.parametrize("bins", [1, 7, 100])
def test_thresholds_are_medians_of_the_histogram(bins):
    logits, labels = _logits(4, 2, 5, 9, 8, scale=1.5), _labels(5, 2, 9, 8, channels=3)
    logits[:, 4] -= 100  # a channel that is never predicted keeps the floor
    samples = reference.background_samples(logits, labels)
    entropy, classes = normalised_entropy(torch.from_numpy(logits))
    histogram = entropy_histogram(entropy, classes, torch.from_numpy(labels) == 0, 5, bins)
    assert histogram.sum() == len(samples)
    found = median_thresholds(histogram, 0.02)
    np.testing.assert_allclose(found.numpy(), reference.medians(samples, 5, bins, 0.02), atol=1e-12)
    assert found[4] == 0.02


def test_thresholds_by_hand():
    # 4 in bin 2, 4 in bin 5: half of 8 is reached at the upper border of bin 2.
    histogram = torch.zeros(3, 10, dtype=torch.int64)
    histogram[0, 2] = histogram[0, 5] = 4
    histogram[1, 9] = 1
    np.testing.assert_allclose(median_thresholds(histogram, 0.001).numpy(), [0.3, 0.95, 0.001], atol=1e-12)


def test_entropy_pseudo_label():
    old, labels = _logits(6, 3, 4, 6, 5, scale=2.0), _labels(7, 3, 6, 5, channels=6)
    labels[2] = 5  # a picture without background
    thresholds = np.array([0.5, 0.3, 0.7, 0.2])
    want, share = reference.entropy_labels(labels, old, thresholds)
    found, factor = entropy_pseudo_label(*map(torch.from_numpy, (labels, old, thresholds)))
    np.testing.assert_array_equal(found.numpy(), want)
    np.testing.assert_allclose(factor.numpy(), share, atol=1e-7)
    assert 0 < share[0] < 1
    assert share[2] == 1


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 11), (3, 8), (1, 1)])
def test_local_pod(height, width):
    new, old = _logits(8, 2, 3, height, width), _logits(9, 2, 3, height, width)
    embedded = local_pod(torch.from_numpy(new))
    for b in range(2):
        want = reference.pod_embedding(new[b], (1, 2, 4))
        np.testing.assert_allclose(np.sort(embedded[b].numpy()), np.sort(want), atol=1e-12)
    found = pod_distance(torch.from_numpy(new), torch.from_numpy(old))
    assert found.item() == pytest.approx(reference.pod(new, old), abs=1e-10)


def test_fold_new():
    logits = _logits(10, 2, 6, 3, 3)
    np.testing.assert_allclose(fold_new(torch.from_numpy(logits), 3).numpy(), reference.folded(logits, 3), atol=1e-12)
    same = torch.from_numpy(logits)
    assert fold_new(same, 6) is same


@pytest.mark.parametrize("pos_weight", [1.0, 2.0, 35.0])
def test_classwise_bce(pos_weight):
    logits, labels = _logits(11, 2, 3, 4, 5), _labels(12, 2, 4, 5, channels=6)
    target, valid = reference.own_targets(labels, 3, 3), labels != 255
    np.testing.assert_array_equal(class_targets(torch.from_numpy(labels), 3, 3).numpy(), target)
    for mask in (None, valid):
        given = None if mask is None else torch.from_numpy(mask)
        found = classwise_bce(torch.from_numpy(logits), torch.from_numpy(target), pos_weight, given)
        assert found.item() == pytest.approx(reference.by_class(logits, target, pos_weight, mask), abs=1e-10)


def test_decompose_and_distil():
    feature, weight = _logits(13, 2, 5, 3, 4), _logits(14, 3, 5)
    parts = decompose(torch.from_numpy(feature), torch.from_numpy(weight))
    for found, want in zip(parts, reference.reasoning(feature, weight), strict=True):
        np.testing.assert_allclose(found.numpy(), want, atol=1e-12)
    new, old = _logits(15, 2, 3, 4, 4), _logits(16, 2, 3, 4, 4)
    found = distil_binary(torch.from_numpy(new), torch.from_numpy(old))
    assert found.item() == pytest.approx(reference.by_class(new, reference.soft(old)), abs=1e-10)
