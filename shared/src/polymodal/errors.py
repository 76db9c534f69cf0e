"""The one exception type that a command turns into a single line and exit code 2, and a hint for its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "did_you_mean"]


class UserError(Exception):
    """Input, file or option that the user can mend.

    The message is one line: what is wrong, where (file, line, option), and what to do. Commands print it without a
    traceback (``--debug`` shows it) and exit with code 2.
    """


def did_you_mean(name: str, known: Iterable[str], count: int = 2) -> str:
    """``"did you mean a or b? "``, the nearest of the ``known`` names, at most ``count``; empty where none is near."""
    close = difflib.get_close_matches(name, list(known), n=count)
    return f"did you mean {' or '.join(close)}? " if close else ""
