"""Methods of a comparison with their grids: options with several values, tried in all combinations. No torch."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polymodal.errors import UserError

from fedcore.algorithms import create
from fedcore.lora_settings import LoraConfig
from fedcore.privacy_settings import PrivacyConfig

__all__ = ["GROUPS", "Cell", "CellKey", "Method", "Point", "edges", "said", "short_names", "split_grid"]

GROUPS: Mapping[str, type[Any]] = {"lora": LoraConfig, "privacy": PrivacyConfig}
"""options of a method that are not its algorithm's, written ``group.option``"""
Point = tuple[tuple[str, Any], ...]
"""one combination of the values of a grid: (option, value) pairs, the rate first"""
CellKey = tuple[str, Point, int]
"""(label of the method, point, seed)"""
_UNSAFE = re.compile(r"[^A-Za-z0-9_.+-]")
_SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


@dataclass(frozen=True)
class Method:
    """A row of the comparison before its options are picked.

    Args:
        label: name of the row.
        algorithm: registered name.
        options: options with one value; those of adapters and privacy begin with ``lora.`` or ``privacy.``.
        grid: options with a list of values, the rate first; none: the algorithm's defaults are run.
    """

    label: str
    algorithm: str
    options: dict[str, Any]
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def points(self) -> list[Point]:
        """All combinations of the grid; one empty point where there is no grid."""
        return [tuple(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclass(frozen=True)
class Cell:
    """One run: a method at one point of its grid, and one seed."""

    method: Method
    point: Point
    seed: int

    @property
    def key(self) -> CellKey:
        """Label, point and seed."""
        return self.method.label, self.point, self.seed

    @property
    def name(self) -> str:
        """Name of its file."""
        names = short_names(self.method.grid)
        chosen = "".join(f"-{names[option]}{_UNSAFE.sub('_', said(value))}" for option, value in self.point)
        return f"{self.method.label}{chosen}-seed{self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        """Options of the algorithm."""
        return {name: value for name, value in self._all() if "." not in name}

    def group(self, name: str) -> dict[str, Any]:
        """Options of a group (``lora`` or ``privacy``) that the method has of its own."""
        return {option.partition(".")[2]: v for option, v in self._all() if option.partition(".")[0] == name}

    def _all(self) -> Iterator[tuple[str, Any]]:
        return iter({**self.method.options, **dict(self.point)}.items())


def split_grid(label: str, algorithm: str, options: Mapping[str, Any]) -> Method:
    """Tell the options with one value from those with a list of them.

    A list is a grid, except for options that take a list (``lora.ranks``): there a list of lists is one. The rate is a
    grid even with one value, as it names the file.

    Args:
        label: name of the row.
        algorithm: registered name.
        options: by name; of adapters and privacy as ``lora.ranks`` and ``privacy.clip``.

    Raises:
        UserError: an unknown algorithm, group or option of a group, privacy of an algorithm that has none, an empty
            grid, a value that is there twice, or a number that YAML takes for a text.
    """
    made = create(algorithm)
    defaults = _defaults(made)
    fixed: dict[str, Any] = {}
    grid: dict[str, tuple[Any, ...]] = {}
    for name, given in options.items():
        _check_name(label, name)
        if name.startswith("privacy.") and not made.private:
            raise UserError(f"{label}: {name} says nothing to {algorithm}, which is not private; leave it out")
        takes_list = isinstance(defaults.get(name), list | tuple)
        many = isinstance(given, list) and (not takes_list or (bool(given) and all(isinstance(v, list) for v in given)))
        values = given if many else [given]
        text = next((v for v in values if isinstance(v, str) and _SCIENTIFIC.fullmatch(v)), None)
        if text is not None:
            raise UserError(f"{label}: {name}={text} is a text for YAML; write {float(text):g}")
        if name == "lr":
            _check_rates(label, values)
            grid[name] = tuple(map(float, values))
        elif many:
            if not values or any(v in values[:i] for i, v in enumerate(values)):
                raise UserError(f"{label}: {name}={given}; expected at least one value, none of them twice")
            grid[name] = tuple(tuple(v) if isinstance(v, list) else _as(v, defaults.get(name)) for v in values)
        else:
            fixed[name] = _as(given, defaults.get(name)) if "." in name else given
    if not grid.get("lr", (1.0,)):  # an empty list: the algorithm's own rate
        del grid["lr"]
    return Method(label, algorithm, fixed, dict(sorted(grid.items(), key=lambda item: item[0] != "lr")))


def _defaults(made: Any) -> dict[str, Any]:
    """Defaults of all options by name; of numbers that may be left out, a number."""
    found = dict(dataclasses.asdict(made))
    for group, kind in GROUPS.items():
        for item in dataclasses.fields(kind):
            value = item.default_factory() if callable(item.default_factory) else item.default
            optional = value is None and "float" in str(item.type)
            found[f"{group}.{item.name}"] = 0.0 if optional else value
    return found


def _check_name(label: str, name: str) -> None:
    """Options of groups exist; those of the algorithm are checked where it is made."""
    group, dot, option = name.partition(".")
    if not dot:
        if name in GROUPS:
            raise UserError(f"{label}: {name} is a group; write its options as {name}.OPTION: VALUE")
        return
    if group not in GROUPS:
        raise UserError(f"{label}: no options {group}.…; groups are {', '.join(GROUPS)}")
    known = [item.name for item in dataclasses.fields(GROUPS[group])]
    if option not in known:
        raise UserError(f"{label}: no option {name}; {group} has {', '.join(known)}")


def _check_rates(label: str, rates: Sequence[Any]) -> None:
    bad = [rate for rate in rates if isinstance(rate, bool) or not isinstance(rate, int | float)]
    if bad or len(set(rates)) < len(rates):
        raise UserError(f"{label}: lr={list(rates)}; expected numbers, none of them twice")


def _as(value: Any, default: Any) -> Any:
    """1 and 1.0 are the same setting where a number with a fraction is expected."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and isinstance(default, float) else value


# ------------------------------------------------------------------ in words


def said(value: Any) -> str:
    """A value in a file name or table."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}"
    return "-".join(map(said, value)) if isinstance(value, list | tuple) else str(value)


def short_names(options: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """Options without their group, where that leaves them apart."""
    last = [name.rpartition(".")[2] for name in options]
    return {name: name if last.count(short) > 1 else short for name, short in zip(options, last, strict=True)}


def edges(grid: Mapping[str, Sequence[Any]], point: Mapping[str, Any]) -> tuple[str, ...]:
    """Options of a point that lie at the end of their grid: lowest or highest of several numbers."""
    found = []
    for name, values in grid.items():
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(values) > 1 and len(numbers) == len(values) and point[name] in (min(numbers), max(numbers)):
            found.append(name)
    return tuple(found)
