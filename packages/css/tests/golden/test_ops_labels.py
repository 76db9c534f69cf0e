"""Pseudo labels, one-hot targets and predictions against slow float64 references."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from css.ops.labels import one_hot, pseudo_label
from css.ops.predict import predict
from hypothesis import given, settings
from hypothesis import strategies as st

_spec = importlib.util.spec_from_file_location("css_reference", Path(__file__).with_name("_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


def world(seed, channels=5, old=3, shape=(2, 4, 5)):
    """Labels of a step (background, new classes, some ignored) and logits of the old network."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 0, 0, *range(old, channels), 255], size=shape)
    logits = 3.0 * rng.normal(size=(shape[0], old, *shape[1:]))
    return labels, logits


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.95, 1.01]))
def test_pseudo_labels(seed, old, threshold):
    labels, logits = world(seed, old + 2, old)
    given_labels, given_logits = torch.from_numpy(labels), torch.from_numpy(logits)
    found = pseudo_label(given_labels, given_logits, threshold)
    np.testing.assert_array_equal(found, reference.pseudo_label(labels, logits, threshold))
    # What was annotated or ignored stays; the inputs are untouched.
    assert torch.equal(found[given_labels != 0], given_labels[given_labels != 0])
    np.testing.assert_array_equal(given_labels, labels)
    np.testing.assert_array_equal(given_logits, logits)


def test_no_label_changes_above_one():
    labels, logits = world(1)
    found = pseudo_label(torch.from_numpy(labels), torch.from_numpy(logits) + 100.0, 1.0 + 1e-6)
    np.testing.assert_array_equal(found, labels)


def test_the_background_of_the_old_network_competes():
    logits = torch.tensor([[3.0, 2.9], [2.9, 3.0]]).reshape(1, 2, 1, 2)
    assert pseudo_label(torch.zeros(1, 1, 2, dtype=torch.long), logits).tolist() == [[[0, 1]]]


def test_the_threshold_itself_is_enough():
    logits = torch.tensor([-9.0, 0.0]).reshape(1, 2, 1, 1)
    labels = torch.zeros(1, 1, 1, dtype=torch.long)
    assert pseudo_label(labels, logits, 0.5).item() == 1
    assert pseudo_label(labels, logits, 0.500001).item() == 0


def test_sure_classes_are_told_apart():
    # Both sigmoids are 1 in float32; the larger logit still wins.
    logits = torch.tensor([0.0, 60.0, 70.0]).reshape(1, 3, 1, 1)
    assert pseudo_label(torch.zeros(1, 1, 1, dtype=torch.long), logits).item() == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_pseudo_labels_keep_the_type_of_the_labels(dtype):
    labels, logits = world(2)
    found = pseudo_label(torch.from_numpy(labels).to(dtype), torch.from_numpy(logits))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, reference.pseudo_label(labels, logits, 0.7))


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 3, 4, 5), (2, 3, 5, 4)])
def test_pseudo_labels_refuse_other_shapes(shape):
    with pytest.raises(ValueError, match=r"expected \(B, H, W\) with"):
        pseudo_label(torch.zeros(2, 4, 5, dtype=torch.long), torch.zeros(shape))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.sampled_from([torch.uint8, torch.int64]))
def test_one_hot(seed, channels, dtype):
    rng = np.random.default_rng(seed)
    labels = rng.choice([*range(channels), 255], size=(2, 3, 4))
    found = one_hot(torch.from_numpy(labels).to(dtype), channels)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found, reference.one_hot(labels, channels))
    np.testing.assert_array_equal(found.sum(dim=1), labels != 255)


def test_one_hot_refuses_a_label_without_a_channel():
    with pytest.raises(RuntimeError, match="out of bounds"):
        one_hot(torch.full((1, 2, 2), 3), 3)
    with pytest.raises(ValueError, match="expected"):
        one_hot(torch.zeros(2, 2, dtype=torch.long), 3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(-5, 5))
def test_predictions(seed, channels, constant):
    logits = np.random.default_rng(seed).normal(size=(2, channels, 3, 4))
    given_logits = torch.from_numpy(logits)
    found = predict(given_logits)
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found, reference.predict(logits))
    for one, row in zip(given_logits, found, strict=True):
        assert torch.equal(predict(one), row)
    # The background head does not take part.
    shifted = given_logits.clone()
    shifted[:, 0] += constant
    assert torch.equal(predict(shifted), found)


def test_no_class_above_one_half_is_background():
    logits = -torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    logits[:, 0] = -50.0  # not even a background that denies itself changes that
    logits[0, 1:, 0, 0] = 0.0  # sigmoid exactly 0.5
    assert not predict(logits).any()
    logits[0, 3, 0, 0] = 1e-3
    assert predict(logits).sum() == 3


def test_predictions_refuse_other_shapes():
    with pytest.raises(ValueError, match="expected"):
        predict(torch.zeros(3, 3))
