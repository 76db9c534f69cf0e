"""The line of progress: passes everything through, is silent for short loops, tells rate and time for long ones."""

from __future__ import annotations

import pytest
from missing_modal import progress
from missing_modal.progress import counted


@pytest.fixture
def clock(monkeypatch):
    """A clock that the loop moves on."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_short_loops_are_silent(capsys):
    assert list(counted(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_long_loops_tell_rate_and_time_left_every_five_seconds(capsys, clock):
    for _ in counted(range(10), "batches", 10):
        clock[0] += 2.0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "batches: 3/10, 0.5/s, 14 s left",
        "batches: 6/10, 0.5/s, 8 s left",
        "batches: 9/10, 0.5/s, 2 s left",
    ]


def test_on_a_terminal_one_line_is_rewritten(capsys, clock, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for _ in counted(range(2), "batches", 2):
        clock[0] += 1.0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith("batches: 2/2, 1.0/s, 0 s left\x1b[K\n")
