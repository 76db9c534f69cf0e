"""Objects named on the command line: ``package.module:Name`` or ``file.py:Name``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from polymodal.errors import UserError, did_you_mean

__all__ = ["call_with", "load_object"]


def load_object(where: str, option: str) -> Any:
    """The object that ``where`` names.

    Args:
        where: ``PATH.TO:Name`` of an installed module, or ``FILE.py:Name``.
        option: command-line option, for messages.

    Raises:
        UserError: another form, no such module or file, or no such name in it; what the module itself raises while it
            is imported is passed on with its place.
    """
    place, colon, name = where.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise UserError(f"--{option} {where}: expected PATH.TO:Name or FILE.py:Name")
    module = _from_file(Path(place), option) if place.endswith(".py") else _from_path(place, option)
    if not hasattr(module, name):
        known = [known for known in vars(module) if not known.startswith("_")]
        raise UserError(f"--{option} {where}: no {name} in {place}; {did_you_mean(name, known)}".rstrip("; "))
    return getattr(module, name)


def _from_path(place: str, option: str) -> Any:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # the module is there, what it imports is not
        raise UserError(f"--{option} {place}: no module {error.name}; install it, or give FILE.py:Name") from error


def _from_file(path: Path, option: str) -> Any:
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"--{option} {path}: no such file")
    name = f"fedcore_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None  # the file ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its classes can be pickled for worker processes
    spec.loader.exec_module(module)
    return module


def call_with(made: Any, options: dict[str, Any], offered: dict[str, Any], option: str) -> Any:
    """Call ``made`` with ``options``, and with those of ``offered`` that it takes and was not given.

    Raises:
        UserError: an option that it does not have, or one that it needs and did not get.
    """
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError):  # without a readable signature, its own error must do
        return made(**options)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [key for key in options if key not in parameters]
    if unknown and not open_ended:
        hint = did_you_mean(unknown[0], parameters)
        raise UserError(f"--{option} has no {unknown[0]!r}; {hint}known: {', '.join(parameters) or 'none'}")
    values = {**{key: value for key, value in offered.items() if key in parameters}, **options}
    needs = [
        key
        for key, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and key not in values
    ]
    if needs:
        raise UserError(f"--{option} needs {', '.join(needs)}; give them in --{option}_options")
    return made(**values)
