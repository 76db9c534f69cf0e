"""The one exception type that a command turns into a single line and exit code 2."""

__all__ = ["UserError"]


class UserError(Exception):
    """Input, file or option that the user can mend.

    The message is one line: what is wrong, where (file, line, option), and what to do. Commands print it without a
    traceback (``--debug`` shows it) and exit with code 2.
    """
