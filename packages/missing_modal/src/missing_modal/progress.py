"""One line on stderr for loops over batches: how many, how fast, how long still."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["counted"]

_PAUSE = 5.0
T = TypeVar("T")


def counted(things: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The things themselves; as they are done, a line tells rate and time left.

    On a terminal the line is rewritten; elsewhere there is one every five seconds, so that short loops are silent.

    Args:
        things: what is looped over.
        what: text of the line, e.g. ``"batches evaluated"``.
        total: how many there are.
    """
    live = sys.stderr.isatty()
    pause = 0.1 if live else _PAUSE
    start = shown = time.monotonic()
    for done, thing in enumerate(things, start=1):
        yield thing
        now = time.monotonic()
        last = live and done == total
        if now - shown < pause and not last:
            continue
        shown = now
        rate = done / max(1e-9, now - start)
        line = f"{what}: {done}/{total}, {rate:.1f}/s, {(total - done) / rate:.0f} s left"
        sys.stderr.write(f"\r{line}\x1b[K" + ("\n" if last else "") if live else line + "\n")
