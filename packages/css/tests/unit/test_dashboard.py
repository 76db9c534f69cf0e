"""Panels: found through the package's entry point, and of metrics that runs really have."""

from __future__ import annotations

import numpy as np
from css.dashboard import SECTIONS
from css.report import StepReport, over_steps
from css.task import Task
from polymodal.dashboards import layout_for


def panels(kind=None):
    return [panel for section in SECTIONS for panel in section.panels if kind in (None, panel.kind)]


def test_the_layout_is_found_by_the_packages_name():
    assert layout_for("css").sections[: len(SECTIONS)] == SECTIONS


def test_test_metrics_are_those_of_the_reports_over_the_task():
    task = Task("1-1", 2)
    reports = [StepReport.of(np.eye(task.num_channels(s), dtype=int), task, ["a", "b"], s) for s in range(2)]
    known = {f"test/{name}" for name in reports[1].metrics() | over_steps(reports)}
    lines = [p for p in panels("line") if p.metrics[0].startswith("test/")]
    assert {name for panel in lines for name in panel.metrics} == known
    assert {panel.x for panel in lines} == {"task"}
    assert {name for panel in panels("bar") for name in panel.metrics} <= known


def test_titles_differ_within_a_section_and_training_goes_by_step():
    for section in SECTIONS:
        titles = [panel.title for panel in section.panels]
        assert len(set(titles)) == len(titles)
    assert {p.x for p in panels("line") if not p.metrics[0].startswith("test/")} == {"step"}
