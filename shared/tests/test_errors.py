"""UserError becomes one line and exit code 2 in every command of ``polymodal``."""

import pytest
from polymodal.cli import run_guarded
from polymodal.errors import UserError


def fail(error):
    def function():
        raise error

    return function


def test_user_error_is_one_line_and_exit_code_two(capsys):
    assert run_guarded(fail(UserError("no such file:\n  x.yaml; give another")), prog="polymodal x") == 2
    assert capsys.readouterr().err == "polymodal x: error: no such file: x.yaml; give another\n"


def test_debug_shows_where_it_came_from(capsys):
    assert run_guarded(fail(UserError("no such file")), prog="polymodal x", debug=True) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.endswith("polymodal x: error: no such file\n")


def test_it_is_no_value_error():
    # Code that catches ValueError must not swallow a message for the user by accident.
    assert not issubclass(UserError, ValueError | OSError)
    with pytest.raises(UserError):
        fail(UserError("x"))()
