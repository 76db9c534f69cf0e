"""Weight files: what is read, and the one line about what is not."""

import pytest
import torch
from css.models.weights import fill, load_tensors
from polymodal.errors import UserError
from safetensors.torch import save_file
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("wrap", [dict, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 1}])
def test_reads_levels_around_the_tensors(tmp_path, wrap):
    state = net().state_dict()
    torch.save(wrap(state), tmp_path / "w.pth")
    assert load_tensors(tmp_path / "w.pth").keys() == state.keys()


def test_reads_safetensors_and_names_of_data_parallel(tmp_path):
    state = net().state_dict()
    save_file({f"module.{name}": value for name, value in state.items()}, tmp_path / "w.safetensors")
    loaded = load_tensors(tmp_path / "w.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


class Surprise:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read weights"),
        (b"not a file of weights", "cannot read weights"),
        (Surprise(), "holds Python objects beside tensors"),
        ({"epoch": 1}, "does not hold a plain dictionary"),
        ({}, "does not hold a plain dictionary"),
        ([torch.zeros(2)], "does not hold a plain dictionary"),
    ],
)
def test_refuses_in_one_line_that_names_the_file(tmp_path, content, message):
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as caught:
        load_tensors(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_refuses_a_truncated_file_and_a_missing_one(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="cannot read weights"):
        load_tensors(path)
    with pytest.raises(UserError, match="does not exist"):
        load_tensors(tmp_path / "other.pth")


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
