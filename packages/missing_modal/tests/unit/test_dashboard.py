"""Panels: of metrics that runs really have."""

from __future__ import annotations

import numpy as np
from missing_modal.dashboard import SECTIONS
from missing_modal.metrics import report


def panels(kind=None):
    return [panel for section in SECTIONS for panel in section.panels if kind in (None, panel.kind)]


def test_metrics_are_those_of_the_report():
    rng = np.random.default_rng(0)
    masks = np.array([1, 2, 3] * 20)
    known = set()
    for task, labels in (("binary", rng.integers(0, 2, 60)), ("multilabel", rng.integers(0, 2, (60, 2)))):
        for split in ("val/", "test/"):
            known |= report(rng.normal(size=(60, 2)), labels, masks, task, prefix=split).keys()
    known |= {"test/nll_calibrated", "test/ece_calibrated", "train/ce", "train/bce", "train/orthogonality"}
    shown = {name for panel in panels() if panel.kind != "table" for name in panel.metrics}
    assert shown <= known


def test_titles_differ_within_a_section_and_everything_goes_by_step():
    for section in SECTIONS:
        titles = [panel.title for panel in section.panels]
        assert len(set(titles)) == len(titles)
    assert {panel.x for panel in panels()} == {"step"}
