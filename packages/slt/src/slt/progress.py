"""One line on stderr for loops over clips: how many, how fast, how long still."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

__all__ = ["progress_line"]

_PAUSE = 5.0


def progress_line(what: str) -> Callable[[int, int], None]:
    """A line on stderr with rate and time left: rewritten on a terminal, elsewhere every five seconds and at the end.

    Args:
        what: the thing that is counted, e.g. ``"clips decoded"``.

    Returns:
        A function of (done so far, how many in all); done may rise by more than one, as with batches.
    """
    first: tuple[float, int] | None = None  # the first call: imports and counting come before it
    shown = time.monotonic()
    live = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        nonlocal first, shown
        now = time.monotonic()
        first = first or (now, done)
        if not live and now - shown < _PAUSE and done != total:
            return
        shown = now
        rate = (done - first[1]) / max(1e-9, now - first[0])
        left = f", {rate:.1f}/s, {(total - done) / rate:.0f} s left" if rate else ""
        sys.stderr.write(f"\r{what}: {done}/{total}{left}\x1b[K" if live else f"{what}: {done}/{total}{left}\n")
        if live and done == total:
            sys.stderr.write("\n")

    return show
