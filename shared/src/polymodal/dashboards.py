"""Panel layouts as data: one neutral table a package, drawn as a W&B workspace and as the sections of the HTML report.

A package brings its own sections through an entry point of the group ``polymodal.dashboards`` (name: import name,
value: ``module:attribute`` of a tuple of ``Section``); training, performance and configuration panels are shared. A
module whose runs count something else than optimizer steps says so by ``STEP_NAME``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any, Literal

from polymodal.errors import UserError

__all__ = ["Layout", "Panel", "Section", "apply_layout", "build_workspace", "layout_for", "sections_of"]

LAYOUTS_GROUP = "polymodal.dashboards"
"""Entry-point group; name: a package's import name, value: ``module:attribute`` of its sections, without torch."""


@dataclass(frozen=True)
class Panel:
    """One panel.

    Args:
        title: heading; says the unit where there is one.
        metrics: full metric names; the key of the table or pictures for these kinds; none for ``config``.
        x: name of the x-axis, as in the loggers: ``step``, ``round`` or ``task``.
        kind: ``line`` (over x), ``bar`` (final value by method), ``table``, ``images`` or ``config`` (run comparer).
    """

    title: str
    metrics: tuple[str, ...] = ()
    x: str = "step"
    kind: Literal["line", "bar", "table", "images", "config"] = "line"


@dataclass(frozen=True)
class Section:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Layout:
    """All sections of one package's dashboard, first things first."""

    package: str
    sections: tuple[Section, ...]

    def to_json(self) -> str:
        """The layout as indented JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


SHARED_SECTIONS = (
    Section(
        "Training",
        (
            Panel("Loss", ("train/loss", "val/loss")),
            Panel("Learning rate", ("train/lr",)),
        ),
    ),
    Section(
        "Performance",
        (
            Panel("Step time (ms)", ("perf/step_ms",)),
            Panel("Throughput (samples/s)", ("perf/samples_per_s",)),
            Panel("Waiting for data (share)", ("perf/data_wait",)),
            Panel("Peak memory (MiB)", ("perf/peak_mib",)),
        ),
    ),
    Section("Configuration", (Panel("What differs between runs", kind="config"),)),
)


def layout_for(package: str) -> Layout:
    """The layout of a package: its own sections, then the shared ones.

    Args:
        package: import name, e.g. ``slt``. A package without sections of its own gets the shared ones.

    Raises:
        UserError: the package's entry point cannot be loaded.
    """
    for point in metadata.entry_points(group=LAYOUTS_GROUP, name=package):
        try:
            own = tuple(point.load())
            step_name = getattr(importlib.import_module(point.module), "STEP_NAME", "step")
        except (ImportError, AttributeError, TypeError) as error:
            raise UserError(f"dashboard of {package}: {point.value} cannot be loaded ({error})") from error
        return Layout(package, own + _by(step_name))
    return Layout(package, SHARED_SECTIONS)


def _by(step_name: str) -> tuple[Section, ...]:
    """The shared sections with steps called ``step_name``."""
    return tuple(
        replace(section, panels=tuple(replace(panel, x=step_name) for panel in section.panels))
        for section in SHARED_SECTIONS
    )


def sections_of(layout: Layout, names: Iterable[str]) -> list[tuple[str, list[Panel]]]:
    """The line panels for which there is a curve, in the layout's order; curves without a panel come last.

    Args:
        layout: of the package.
        names: metrics that have a curve.

    Returns:
        (section title, panels with one metric each); leftover metrics stand in sections called by their prefix.
    """
    left = set(names)
    result: list[tuple[str, list[Panel]]] = []
    for section in layout.sections:
        panels = []
        for panel in section.panels:
            if panel.kind != "line":
                continue
            found = [m for m in panel.metrics if m in left]
            left.difference_update(found)
            # One chart a metric: the report shows several groups in each.
            panels += [Panel(panel.title, (m,), panel.x) for m in found]
        if panels:
            result.append((section.title, panels))
    by_prefix: dict[str, list[Panel]] = {}
    for name in sorted(left):
        by_prefix.setdefault(f"More {name.partition('/')[0]}", []).append(Panel(name, (name,)))
    return result + list(by_prefix.items())


# ------------------------------------------------------------------ W&B


def apply_layout(layout: Layout, project: str, entity: str | None = None, name: str = "") -> str:
    """Write the layout into a W&B project as a saved view.

    Args:
        layout: what to show.
        project: W&B project that holds the runs.
        entity: team or user; the account's default if ``None``.
        name: name of the view.

    Returns:
        Address of the view.

    Raises:
        UserError: the extra or the account is missing, or W&B cannot be reached or refuses.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("wandb-workspaces is not installed: pip install 'polymodal[dashboards]' (--dry-run needs none)")
    from polymodal.config import LoggingConfig
    from polymodal.wandb_mode import wandb_mode

    if wandb_mode(LoggingConfig()) != "online":
        raise UserError(
            "no W&B account is configured (or WANDB_MODE is offline): run `wandb login`, or use the offline twin: "
            "`polymodal report runs/ --html`"
        )
    import wandb

    try:
        entity = entity or wandb.Api(timeout=20).default_entity
        if not entity:
            raise UserError("this W&B account has no default entity; name one with --entity")
        workspace = build_workspace(layout, entity, project, name or f"polymodal {layout.package}")
        workspace.save()
        return str(workspace.url)
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise UserError(f"W&B did not take the dashboard: {' '.join(str(error).split())}") from error


def build_workspace(layout: Layout, entity: str, project: str, name: str) -> Any:
    """The layout as a ``wandb_workspaces.workspaces.Workspace``, not saved yet.

    Runs are grouped by method: lines are means over seeds with a band of one standard deviation.
    """
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name=s.title, panels=[_wandb_panel(p) for p in s.panels], is_open=index < 3)
        for index, s in enumerate(layout.sections)
    ]
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, auto_generate_panels=True)


def _wandb_panel(panel: Panel) -> Any:
    # By name: the module has no type information for what it re-exports.
    wr: Any = importlib.import_module("wandb_workspaces.reports.v2")
    grouped: dict[str, Any] = {
        "groupby": wr.Config("method"),
        "groupby_aggfunc": "mean",
        "groupby_rangefunc": "stddev",
    }
    if panel.kind == "line":
        return wr.LinePlot(title=panel.title, x=panel.x, y=list(panel.metrics), **grouped)
    if panel.kind == "bar":
        return wr.BarPlot(title=panel.title, metrics=list(panel.metrics), orientation="v", **grouped)
    if panel.kind == "table":
        return wr.WeavePanelSummaryTable(table_name=panel.metrics[0])
    if panel.kind == "images":
        return wr.MediaBrowser(title=panel.title, media_keys=list(panel.metrics))
    return wr.RunComparer(diff_only=True)
