"""Lines of progress: everything passes through, short loops are silent, long ones tell rate and time left."""

from __future__ import annotations

import pytest
from polymodal import progress
from polymodal.progress import counted, progress_line


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the loop moves on."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_short_loops_are_silent(capsys) -> None:
    assert list(counted(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert list(counted([], "letters", 0)) == []
    assert capsys.readouterr() == ("", "")


def test_long_loops_tell_rate_and_time_left_every_five_seconds(capsys, clock) -> None:
    for _ in counted(range(10), "pictures", 10):
        clock[0] += 2.0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "pictures: 3/10, 0.5/s, 14 s left",
        "pictures: 6/10, 0.5/s, 8 s left",
        "pictures: 9/10, 0.5/s, 2 s left",
    ]


def test_on_a_terminal_one_line_is_rewritten(capsys, clock, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for _ in counted(range(2), "pictures", 2):
        clock[0] += 1.0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith("pictures: 2/2, 1.0/s, 0 s left\x1b[K\n")


def test_on_a_terminal_it_is_rewritten_ten_times_a_second_at_most(capsys, clock, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for _ in counted(range(1000), "rows", 1000):
        clock[0] += 0.001
    assert capsys.readouterr().err.count("\r") <= 11


def test_a_line_that_is_told_counts_from_its_first_call_and_always_says_the_end(capsys, clock) -> None:
    show = progress_line("clips decoded")
    clock[0] += 60.0  # listing the files
    show(4, 20)
    clock[0] += 2.0
    show(12, 20)
    clock[0] += 2.0
    show(20, 20)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["clips decoded: 4/20", "clips decoded: 20/20, 4.0/s, 0 s left"]
