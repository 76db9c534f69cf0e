"""A lazy table of methods per package: name, where the class lives, paper, summary. Listing imports nothing heavy."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from polymodal.errors import UserError, did_you_mean

__all__ = ["MethodInfo", "Registry"]

Fidelity = Literal["paper", "code", "reconstruction"]


@dataclass(frozen=True)
class MethodInfo:
    """One row of a package's table.

    Args:
        name: lower-case name, words joined by ``_``.
        target: ``"module:Class"``; imported only when the method is created.
        paper: short reference, e.g. ``"Liu et al. 2025, arXiv 2509.14036"``.
        summary: one line for tables and ``polymodal list``.
        tags: free labels; contract checks select by them.
        fidelity: ``paper`` (equations of the paper), ``code`` (official code), ``reconstruction`` (our reading).

    Raises:
        ValueError: a name, target or fidelity of the wrong form.
    """

    name: str
    target: str
    paper: str
    summary: str
    tags: tuple[str, ...] = ()
    fidelity: Fidelity = "paper"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", self.name):
            raise ValueError(f"method name {self.name!r}; expected lower-case words joined by _")
        if not re.fullmatch(r"[\w.]+:\w+", self.target):
            raise ValueError(f"{self.name}: target {self.target!r}; expected 'module:Class'")
        if self.fidelity not in get_args(Fidelity):
            raise ValueError(
                f"{self.name}: fidelity {self.fidelity!r}; expected one of {', '.join(get_args(Fidelity))}"
            )


class Registry:
    """Methods of one kind in one package.

    Args:
        kind: what the entries are, for error messages, e.g. ``"fusion"``.
        rows: the table.

    Raises:
        ValueError: two rows have the same name.
    """

    def __init__(self, kind: str, rows: Iterable[MethodInfo]) -> None:
        self.kind = kind
        self._rows: dict[str, MethodInfo] = {}
        for row in rows:
            if row.name in self._rows:
                raise ValueError(f"{kind} {row.name!r} is registered twice")
            self._rows[row.name] = row

    def __iter__(self) -> Iterator[MethodInfo]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def names(self) -> list[str]:
        """Names in table order."""
        return list(self._rows)

    def info(self, name: str) -> MethodInfo:
        """The row called ``name``.

        Raises:
            UserError: no such name; the message has the nearest names and the list.
        """
        if name in self._rows:
            return self._rows[name]
        hint = did_you_mean(name, self._rows)
        raise UserError(f"unknown {self.kind} {name!r}; {hint}known: {', '.join(self._rows)}")

    def load(self, name: str) -> type[Any]:
        """Import and return the class called ``name`` (UserError for an unknown name)."""
        module, _, attribute = self.info(name).target.partition(":")
        loaded: type[Any] = getattr(importlib.import_module(module), attribute)
        return loaded

    def create(self, name: str, /, *args: Any, **config: Any) -> Any:
        """Create the method ``name`` with its options.

        Raises:
            UserError: unknown name, an option that the method does not have, or a value of another type than the
                constructor's annotation says (checked for numbers, texts and switches).
        """
        cls = self.load(name)
        try:
            accepted = inspect.signature(cls).parameters
        except ValueError:  # classes of extension modules have no signature; their own TypeError must do
            return cls(*args, **config)
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        unknown = [key for key in config if key not in accepted]
        if unknown and not open_ended:
            hint = did_you_mean(unknown[0], accepted)
            raise UserError(f"{self.kind} {name!r} has no option {unknown[0]!r}; {hint}known: {', '.join(accepted)}")
        try:
            # A dataclass inherits fields whose annotations are names of its bases' modules.
            hints = get_type_hints(cls if dataclasses.is_dataclass(cls) else cls.__init__)
        except NameError:  # names that only a type checker imports
            hints = {}
        for key, value in config.items():
            _check_type(f"{self.kind} {name!r}: option {key}", value, hints.get(key))
        return cls(*args, **config)


_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _check_type(what: str, value: Any, hint: Any) -> None:
    """Refuse a value from a command line or file that is no ``hint``; hints beyond ``_PLAIN`` and None say nothing."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(kind not in _PLAIN and kind is not types.NoneType for kind in kinds):
        return
    accepts = {*kinds, int} if float in kinds else set(kinds)
    if type(value) in accepts or (not isinstance(value, bool) and isinstance(value, tuple(accepts))):
        return
    expected = " or ".join(_PLAIN.get(kind, "null") for kind in kinds)
    number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value) and float in kinds
    hint_text = f"; YAML takes {value} for a text, write {float(value)}" if number else ""
    raise UserError(f"{what}={value!r}; expected {expected}{hint_text}")
