"""One line on stderr for loops of minutes: how many are done, how fast, how long still."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["counted", "progress_line"]

_PAUSE = 5.0
_LIVE_PAUSE = 0.1
T = TypeVar("T")


def progress_line(what: str, *, always: bool = True) -> Callable[[int, int], None]:
    """A line on stderr with rate and time left: rewritten on a terminal, elsewhere every five seconds and at the end.

    Args:
        what: the thing that is counted, e.g. ``"clips decoded"``.
        always: off a terminal, say the end too; without it, what takes less than five seconds is silent there.

    Returns:
        A function of (done so far, how many in all); done may rise by more than one, as with batches. The rate counts
        from its first call: imports and listings come before that.
    """
    first: tuple[float, int] | None = None
    shown = time.monotonic()
    live = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        nonlocal first, shown
        now = time.monotonic()
        first = first or (now, done)
        last = done == total and (live or always)
        if now - shown < (_LIVE_PAUSE if live else _PAUSE) and not last:
            return
        shown = now
        rate = (done - first[1]) / max(1e-9, now - first[0])
        left = f", {rate:.1f}/s, {(total - done) / rate:.0f} s left" if rate else ""
        line = f"{what}: {done}/{total}{left}"
        sys.stderr.write(f"\r{line}\x1b[K" + ("\n" if last else "") if live else line + "\n")

    return show


def counted(things: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The things themselves; as they are done, a line tells rate and time left.

    On a terminal the line is rewritten; elsewhere there is one every five seconds, so that short loops are silent.

    Args:
        things: what is looped over.
        what: text of the line, e.g. ``"batches tested"``.
        total: how many there are.
    """
    show = progress_line(what, always=False)
    if total:
        show(0, total)
    for done, thing in enumerate(things, start=1):
        yield thing
        show(done, total)
