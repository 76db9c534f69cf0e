"""Weight files: what is read, and the one line about what is not."""

from __future__ import annotations

import pytest
import torch
from polymodal.errors import UserError
from polymodal.weights import has_weights, load_tensors, quiet_transformers
from safetensors.torch import save_file


def state():
    return {"0.weight": torch.randn(4, 3), "0.bias": torch.zeros(4), "1.count": torch.tensor(3)}


@pytest.mark.parametrize("wrap", [dict, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 1}])
def test_reads_levels_around_the_tensors(tmp_path, wrap):
    tensors = state()
    torch.save(wrap(tensors), tmp_path / "w.pth")
    assert load_tensors(tmp_path / "w.pth").keys() == tensors.keys()


def test_reads_safetensors_and_names_of_data_parallel(tmp_path):
    tensors = state()
    save_file({f"module.{name}": value for name, value in tensors.items()}, tmp_path / "w.safetensors")
    loaded = load_tensors(tmp_path / "w.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


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
    save_file(state(), path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="cannot read weights"):
        load_tensors(path)
    with pytest.raises(UserError, match="does not exist"):
        load_tensors(tmp_path / "other.pth")


def test_a_prefix_that_is_the_models_own_stays_where_asked(tmp_path):
    save_file({f"module.{name}": value for name, value in state().items()}, tmp_path / "w.safetensors")
    assert all(name.startswith("module.") for name in load_tensors(tmp_path / "w.safetensors", strip=""))


def test_a_folder_has_weights_in_one_file_or_several(tmp_path):
    assert not has_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not has_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert has_weights(tmp_path)


def test_transformers_is_quiet_only_while_it_loads():
    logging = pytest.importorskip("transformers.utils.logging")
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert before == (logging.get_verbosity(), logging.is_progress_bar_enabled())
