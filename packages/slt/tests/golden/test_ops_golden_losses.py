"""Contrastive and triplet losses and lengths against slow float64 references and the specification's own numbers."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from slt.ops.contrastive import INITIAL_LOGIT_SCALE, contrastive_loss, question_triplet_loss
from slt.ops.lengths import conv_length, padded_length, token_length

_spec = importlib.util.spec_from_file_location("slt_reference", Path(__file__).with_name("_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


@pytest.mark.parametrize("log_scale", [0.0, INITIAL_LOGIT_SCALE, 4.0, 9.0])
@pytest.mark.parametrize("count", [1, 2, 4, 9])
@pytest.mark.parametrize("variant", ["infonce", "gfslt", "multi"])
def test_contrastive(variant, count, log_scale):
    rng = np.random.default_rng(count)
    a, b = rng.normal(size=(2, count, 5))
    ids = [int(i) for i in rng.integers(0, max(1, count // 2), count)]
    found = contrastive_loss(torch.from_numpy(a), torch.from_numpy(b), log_scale, variant, ids)
    assert found.item() == pytest.approx(reference.contrastive(a, b, log_scale, variant, ids), abs=1e-10)


def test_target_of_gfslt_at_four():
    # With equal features softmax is uniform: KL = ln 4 - entropy of the target, whose diagonal is 0.999864.
    same = torch.ones(4, 3, dtype=torch.float64)
    other = (1 - 0.9998638) / 3
    entropy = -(0.9998638 * math.log(0.9998638) + 3 * other * math.log(other))
    assert contrastive_loss(same, same, 0.0, "gfslt").item() == pytest.approx(math.log(4) - entropy, abs=2e-6)


def test_triplet():
    rng = np.random.default_rng(5)
    anchor, positive = rng.normal(size=(2, 6, 4))
    negatives = rng.normal(size=(6, 2, 4))
    found = question_triplet_loss(*(torch.from_numpy(x) for x in (anchor, positive, negatives)))
    assert found.item() == pytest.approx(reference.triplet(anchor, positive, negatives), abs=1e-10)
    rolled = np.stack([np.roll(positive, -1, axis=0), np.roll(positive, -2, axis=0)], axis=1)
    found = question_triplet_loss(torch.from_numpy(anchor), torch.from_numpy(positive))
    assert found.item() == pytest.approx(reference.triplet(anchor, positive, rolled), abs=1e-10)


@pytest.mark.parametrize(
    ("frames", "gfslt", "vac"),
    [(1, (20, 2), (16, 1)), (5, (24, 3), (20, 2)), (42, (60, 12), (56, 11)), (300, (316, 76), (312, 75))],
)
def test_lengths_of_the_specification(frames, gfslt, vac):
    assert (padded_length(frames, "gfslt"), token_length(frames, "gfslt")) == gfslt
    assert (padded_length(frames, "vac"), token_length(frames, "vac")) == vac


def test_conv_length_counts_windows():
    assert [conv_length(p) for p in range(16, 400)] == [reference.convolved(p) for p in range(16, 400)]
