"""The folder of a step: weights that say what they belong to, and the mark that makes it finished."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from css.steps import META_VERSION, load_weights, reopen_steps, save_weights, step_done, step_folder, write_done
from polymodal.errors import UserError

STATE = {"heads.0.weight": torch.arange(6.0).reshape(2, 3), "heads.0.bias": torch.tensor([1, 2])}


def test_weights_come_back_with_what_they_belong_to(tmp_path):
    path = tmp_path / "steps" / "03" / "weights.safetensors"
    state = {**STATE, "view": torch.arange(8.0)[::2], "half": torch.ones(2, dtype=torch.bfloat16)}
    save_weights(path, {**state, "grad": torch.ones(1, requires_grad=True)}, {"task": "2-1", "order": [2, 1]})
    found, meta = load_weights(path)
    assert meta == {"schema_version": META_VERSION, "task": "2-1", "order": [2, 1]}
    assert found.keys() == {*state, "grad"}
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert found["half"].dtype == torch.bfloat16
    assert [p.name for p in path.parent.iterdir()] == ["weights.safetensors"], "no temporary file is left"


def test_equal_weights_are_equal_files(tmp_path):
    for name in ("a", "b"):
        save_weights(tmp_path / name, dict(STATE), {"task": "2-1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: p.unlink(), "no such file; give a run folder"),
        (lambda p: p.write_bytes(b""), "is damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[:-3]), "is damaged"),
        (lambda p: p.write_bytes(b"\xff" * 40), "is damaged"),
        (lambda p: save_weights(p, STATE, {"schema_version": 9}), "schema version 9 is newer than this css reads"),
    ],
)
def test_weights_that_cannot_be_read(tmp_path, spoil, words):
    path = tmp_path / "weights.safetensors"
    save_weights(path, STATE, {})
    spoil(path)
    with pytest.raises(UserError) as refusal:
        load_weights(path)
    assert words in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_weights_of_others_are_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="holds no network of css-train"):
        load_weights(tmp_path / "x.safetensors")


def test_the_mark_of_a_finished_step(tmp_path):
    assert step_folder(tmp_path, 3) == tmp_path / "steps" / "03"
    assert step_done(tmp_path, 3) is None
    step_folder(tmp_path, 3).mkdir(parents=True)
    write_done(tmp_path, 3, {"optimizer_steps": 12})
    assert step_done(tmp_path, 3) == {"schema_version": META_VERSION, "step": 3, "optimizer_steps": 12}
    path = step_folder(tmp_path, 3) / "done.json"
    path.write_text(path.read_text()[:-5])
    with pytest.raises(UserError, match=r"done\.json is damaged .*; delete it, css-train --resume then trains"):
        step_done(tmp_path, 3)


def test_a_step_is_opened_again_with_all_later_ones(tmp_path):
    assert reopen_steps(tmp_path, 0) == []
    for step in (0, 1, 2, 10, 100):
        step_folder(tmp_path, step).mkdir(parents=True)
        write_done(tmp_path, step, {})
    (tmp_path / "steps" / "notes").mkdir()
    (tmp_path / "steps" / "notes" / "done.json").write_text(json.dumps({}))
    assert reopen_steps(tmp_path, 2) == [2, 10, 100]
    assert [step for step in (0, 1, 2, 10, 100) if step_done(tmp_path, step)] == [0, 1]
    assert (tmp_path / "steps" / "notes" / "done.json").is_file()
