"""Weights are put into a module whole, or the one line says what does not fit."""

import pytest
import torch
from css.models.weights import fill
from polymodal.errors import UserError
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))


def test_fill_leaves_out_the_classifier_and_old_counters():
    source, target = net(), net()
    with torch.no_grad():
        for p in source.parameters():
            p.add_(1)
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    before = target[2].weight.clone()
    fill(target, state, "f.pth", "a net", skip=("2.",))
    assert torch.equal(target[0].weight, source[0].weight)
    assert torch.equal(target[2].weight, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.weight"), r"f\.pth is not a net: 1 missing \(0\.weight\)"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unknown \(extra\)"),
        (lambda s: s.update({"0.bias": torch.zeros(9)}), r"1 of another shape \(0\.bias \(9,\) instead of \(4,\)\)"),
    ],
)
def test_fill_refuses_what_does_not_fit_and_changes_nothing(change, message):
    target, state = net(), {name: value + 1 for name, value in net().state_dict().items()}
    before = {name: value.clone() for name, value in target.state_dict().items()}
    change(state)
    with pytest.raises(UserError, match=message):
        fill(target, state, "f.pth", "a net")
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
