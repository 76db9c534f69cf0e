"""Which packages of the family are installed and which methods they offer: `polymodal list`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata

from polymodal.errors import UserError
from polymodal.registry import MethodInfo, Registry
from polymodal.tables import markdown

__all__ = ["METHODS_GROUP", "Package", "import_name", "installed_packages", "listing"]

METHODS_GROUP = "polymodal.methods"
"""Entry-point group; each value is ``module:attribute`` of a ``Registry`` (or rows) in a module without torch."""

_ROOT = "polymodal"


@dataclass(frozen=True)
class Package:
    """One installed distribution of the family.

    Args:
        name: distribution, e.g. ``polymodal-slt``.
        module: import name, e.g. ``slt``.
        version: installed version.
        summary: one line from the metadata.
        tables: kind -> rows; empty while the package has no method.
        problem: why a table could not be loaded; empty if all is well.
    """

    name: str
    module: str
    version: str
    summary: str
    tables: dict[str, tuple[MethodInfo, ...]]
    problem: str = ""


def installed_packages() -> list[Package]:
    """All installed ``polymodal-*`` distributions, and any other that offers methods, sorted by name.

    Tables are found through entry points of the group ``polymodal.methods``. A table that cannot be imported is
    reported in ``Package.problem``; the others are still listed.
    """
    found: dict[str, Package] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"] or ""
        points = [p for p in distribution.entry_points if p.group == METHODS_GROUP]
        if name in found or not (points or name.startswith(f"{_ROOT}-")):
            continue
        tables, problem = _load_tables(points)
        found[name] = Package(
            name=name,
            module=import_name(name),
            version=distribution.version,
            summary=distribution.metadata["Summary"] or "",
            tables=tables,
            problem=problem,
        )
    return [found[name] for name in sorted(found)]


def import_name(distribution: str) -> str:
    """Import name of a distribution of the family: ``polymodal-missing-modal`` is imported as ``missing_modal``."""
    return distribution.removeprefix(f"{_ROOT}-").replace("-", "_")


def _load_tables(points: Iterable[metadata.EntryPoint]) -> tuple[dict[str, tuple[MethodInfo, ...]], str]:
    tables: dict[str, tuple[MethodInfo, ...]] = {}
    problems = []
    for point in points:
        try:
            table = point.load()
            rows = tuple(table)
        except (ImportError, AttributeError, TypeError) as error:
            problems.append(f"{point.value} cannot be loaded ({type(error).__name__}: {error})")
            continue
        kind = table.kind if isinstance(table, Registry) else point.name
        tables[kind] = tables.get(kind, ()) + rows
    return tables, "; ".join(problems)


def listing(packages: Sequence[Package], package: str = "", form: str = "text") -> str:
    """Text of ``polymodal list``.

    Args:
        packages: what is installed.
        package: show this one only (import name or distribution name); all if empty.
        form: ``text`` for a terminal, ``md`` for one Markdown table.

    Raises:
        UserError: ``package`` is not installed.
    """
    if package:
        chosen = [p for p in packages if package in (p.name, p.module)]
        if not chosen:
            raise UserError(f"--package {package}: not installed; here are {', '.join(p.module for p in packages)}")
        packages = chosen
    if form == "md":
        rows = [
            [p.module, kind, m.name, m.fidelity, m.paper, m.summary]
            for p in packages
            for kind, methods in p.tables.items()
            for m in methods
        ]
        return markdown(["package", "kind", "method", "fidelity", "paper", "summary"], rows)
    return "\n\n".join(_block(p) for p in packages)


def _block(package: Package) -> str:
    lines = [f"{package.module}: {package.summary or 'no summary'} ({package.name} {package.version})"]
    for kind, methods in package.tables.items():
        lines.append(f"  {kind}")
        width = max((len(m.name) for m in methods), default=0)
        for method in methods:
            lines.append(f"    {method.name:<{width}}  {method.fidelity:<14}  {method.paper}")
            summary = textwrap.fill(method.summary, 110 - width, break_on_hyphens=False)
            lines.append(textwrap.indent(summary, " " * (width + 6)))
    if package.problem:
        lines.append(f"  broken: {package.problem}; `polymodal doctor` says more")
    elif not package.tables:
        lines.append("  not here yet: this package registers no method")
    return "\n".join(lines)
