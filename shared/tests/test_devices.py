"""The device of a command: the best there is, the one that was named, or one line that it is not there."""

from __future__ import annotations

import pytest
import torch
from polymodal.devices import pick_device
from polymodal.errors import UserError


@pytest.mark.parametrize(
    ("cuda", "mps", "best"), [(True, False, "cuda"), (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_is_the_best_there_is(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, best: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto") == best
    assert pick_device("auto", ("cuda", "cpu")) == ("cuda" if cuda else "cpu")
    assert pick_device("cpu") == "cpu"


def test_a_named_device_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1", "abacus"):
        with pytest.raises(UserError, match=f"--device {name}: torch finds none here; use auto or cpu"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("cuda:1") == "cuda:1"
