"""Networks from whatever css-train leaves behind."""

from __future__ import annotations

import json

import pytest
import torch
from css.checkpoint import load_network, network_of
from css.methods import METHODS
from css.models.build import build_network
from css.settings import NetworkConfig
from css.steps import save_weights, step_folder, write_done
from polymodal.errors import UserError

TINY = NetworkConfig(name="tiny", width=4)


def meta(step=1, method="ft", **more):
    return {
        "task": "2-1", "report_task": "2-1", "num_classes": 4, "order": [3, 1, 2, 4], "setting": "overlap",
        "step": step, "channels": [2, 1, 1][: step + 1], "method": method, "method_options": {},
        "network": {"name": "tiny", "width": 4, "weights": "/gone/backbone.pth", "of_a_later_version": 1},
        "class_names": ["a", "b", "c", "d"], "crop": 32, "data": "shapes", "fingerprint": "f", **more,
    }  # fmt: skip


def network(facts, seed=0):
    torch.manual_seed(seed)
    net = build_network(TINY, facts["channels"], method=METHODS.create(facts["method"]))
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return net


@pytest.fixture
def run(tmp_path):
    """A run folder with two finished steps and one that is not."""
    for step in range(3):
        folder = step_folder(tmp_path, step)
        save_weights(folder / "weights.safetensors", network(meta(step), step).state_dict(), meta(step))
        if step < 2:
            write_done(tmp_path, step, {})
    return tmp_path


def test_a_run_folder_stands_for_its_last_finished_step(run):
    assert load_network(run).meta["step"] == 1
    assert load_network(step_folder(run, 0)).meta["step"] == 0
    assert load_network(step_folder(run, 2) / "weights.safetensors").meta["step"] == 2


def test_what_comes_back(run):
    loaded = load_network(run)
    assert loaded.task.steps == ((3, 1), (2,), (4,))
    assert loaded.path == step_folder(run, 1) / "weights.safetensors"
    assert not loaded.net.training
    assert type(loaded.method) is type(METHODS.create("ft"))
    images = torch.randn(2, 3, 16, 16)
    expected = network(meta(1), 1).eval()
    assert torch.equal(loaded.net.full_logits(images), expected.full_logits(images))


@pytest.mark.parametrize("method", ["eir", "ssul", "mib"])
def test_networks_of_other_methods(tmp_path, method):
    facts = meta(method=method)
    save_weights(tmp_path / "weights.safetensors", network(facts).state_dict(), facts)
    loaded = load_network(tmp_path)
    assert (loaded.net.unknown is not None) == (method == "ssul")
    assert loaded.method.softmax == (method == "mib")


def lightning_file(path, facts, net, **more):
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    path.parent.mkdir(exist_ok=True)
    torch.save({"state_dict": state, "css": facts, "polymodal": {"schema_version": 1}, **more}, path)


def test_a_lightning_checkpoint_of_an_unfinished_run(tmp_path):
    facts = meta(0)
    lightning_file(tmp_path / "checkpoints" / "last.ckpt", facts, network(facts))
    for path in (tmp_path, tmp_path / "checkpoints" / "last.ckpt"):
        loaded = load_network(path)
        assert loaded.meta["channels"] == [2]
        assert torch.equal(loaded.net.heads[1].weight, network(facts).heads[1].weight)


def test_what_is_no_network_is_refused(run, tmp_path):
    facts = meta()
    lightning_file(tmp_path / "foreign" / "x.ckpt", None, network(facts))
    lightning_file(tmp_path / "newer" / "x.ckpt", facts | {"schema_version": 9}, network(facts))
    save_weights(tmp_path / "other" / "weights.safetensors", network(facts).state_dict(), facts | {"channels": [3, 1]})
    save_weights(tmp_path / "method" / "weights.safetensors", network(facts).state_dict(), facts | {"method": "mip"})
    cases = {
        tmp_path / "nowhere": "no finished step and no checkpoint there; give a run folder or file of css-train",
        tmp_path / "foreign" / "x.ckpt": "is no checkpoint of css-train",
        tmp_path / "newer" / "x.ckpt": "schema version 9 is newer",
        tmp_path / "other": "weights do not fit the network they name",
        tmp_path / "method": "unknown method 'mip'; did you mean mib?",
    }
    for path, words in cases.items():
        with pytest.raises(UserError) as refusal:
            load_network(path)
        assert words in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_metadata_alone_give_a_network_of_the_same_form():
    net = network_of(meta(2), METHODS.create("ft"))
    assert net.channels == (2, 1, 1)
    assert json.loads(json.dumps(meta(2)))["channels"] == [2, 1, 1]
