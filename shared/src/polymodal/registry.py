"""A lazy table of methods per package: name, where the class lives, paper, summary. Listing imports nothing heavy."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from polymodal.errors import UserError

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
    """

    name: str
    target: str
    paper: str
    summary: str
    tags: tuple[str, ...] = ()
    fidelity: Fidelity = "paper"


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
        close = difflib.get_close_matches(name, self._rows, n=2)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError(f"unknown {self.kind} {name!r}; {hint}known: {', '.join(self._rows)}")

    def load(self, name: str) -> type[Any]:
        """Import and return the class called ``name`` (UserError for an unknown name)."""
        module, _, attribute = self.info(name).target.partition(":")
        loaded: type[Any] = getattr(importlib.import_module(module), attribute)
        return loaded

    def create(self, name: str, /, *args: Any, **config: Any) -> Any:
        """Create the method ``name`` with its options.

        Raises:
            UserError: unknown name, or an option that the method does not have.
        """
        cls = self.load(name)
        try:
            return cls(*args, **config)
        except TypeError as error:
            if "unexpected keyword argument" in str(error):
                key = str(error).rsplit("'", 2)[1]
                raise UserError(f"{self.kind} {name!r} has no option {key!r}; see its docstring: {cls.__module__}") from error
            raise
