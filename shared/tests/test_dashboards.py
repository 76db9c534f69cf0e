"""Layouts: lookup by package, order in the report, the W&B form of them."""

import importlib.util
import json
from importlib import metadata

import pytest
from polymodal import dashboards
from polymodal.dashboards import Layout, Panel, Section, apply_layout, layout_for, sections_of
from polymodal.errors import UserError

OWN = (
    Section("Scores", (Panel("Score", ("val/a", "val/b")), Panel("Final", ("test/a",), kind="bar"))),
    Section("Samples", (Panel("Samples", ("test/samples",), kind="table"), Panel("Gates", ("g",), kind="images"))),
)


@pytest.fixture
def installed(monkeypatch):
    """Pretends that entry points are installed."""

    def install(**targets):
        points = [metadata.EntryPoint(name, value, dashboards.LAYOUTS_GROUP) for name, value in targets.items()]

        def entry_points(group, name):
            assert group == "polymodal.dashboards"
            return [p for p in points if p.name == name]

        monkeypatch.setattr(dashboards.metadata, "entry_points", entry_points)

    return install


def test_a_package_brings_its_own_sections_before_the_shared_ones(installed, monkeypatch):
    monkeypatch.setattr(dashboards, "OWN_FOR_TEST", OWN, raising=False)
    installed(slt="polymodal.dashboards:OWN_FOR_TEST")
    assert layout_for("slt").sections == OWN + dashboards.SHARED_SECTIONS
    assert layout_for("other").sections == dashboards.SHARED_SECTIONS


def test_shared_panels_go_by_what_a_package_counts(installed, monkeypatch):
    monkeypatch.setattr(dashboards, "OWN_FOR_TEST", OWN, raising=False)
    monkeypatch.setattr(dashboards, "STEP_NAME", "round", raising=False)
    installed(fedcore="polymodal.dashboards:OWN_FOR_TEST")
    shared = layout_for("fedcore").sections[len(OWN) :]
    assert {panel.x for section in shared for panel in section.panels} == {"round"}
    assert [section.title for section in shared] == [section.title for section in dashboards.SHARED_SECTIONS]


@pytest.mark.parametrize("target", ["polymodal.nowhere:X", "polymodal.dashboards:nothing"])
def test_a_broken_entry_point_is_named(installed, target):
    installed(slt=target)
    with pytest.raises(UserError, match=f"dashboard of slt: {target} cannot be loaded"):
        layout_for("slt")


def test_report_sections_follow_the_layout_and_lose_no_curve():
    layout = Layout("x", OWN + dashboards.SHARED_SECTIONS)
    names = {"train/loss", "val/b", "val/a", "comm/up_bytes", "train/aux", "test/a"}
    found = [(title, [p.metrics[0] for p in panels]) for title, panels in sections_of(layout, names)]
    assert found == [
        ("Scores", ["val/a", "val/b"]),
        ("Training", ["train/loss"]),
        ("More comm", ["comm/up_bytes"]),
        ("More test", ["test/a"]),
        ("More train", ["train/aux"]),
    ]


def test_no_metric_stands_in_two_line_panels_of_an_installed_layout():
    packages = [p.name for p in metadata.entry_points(group=dashboards.LAYOUTS_GROUP)]
    for package in ["none", *packages]:
        metrics = [m for s in layout_for(package).sections for p in s.panels if p.kind == "line" for m in p.metrics]
        assert metrics
        assert len(metrics) == len(set(metrics))


def test_json_holds_the_whole_table():
    tree = json.loads(Layout("x", OWN).to_json())
    assert tree["package"] == "x"
    assert tree["sections"][0]["panels"][1] == {"title": "Final", "metrics": ["test/a"], "x": "step", "kind": "bar"}


def test_x_axes_agree_with_the_loggers():
    from polymodal.logs import X_AXES

    for section in dashboards.SHARED_SECTIONS:
        for panel in section.panels:
            for metric in panel.metrics:
                assert panel.x == X_AXES[f"{metric.partition('/')[0]}/*"]


def test_applying_without_the_extra_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb-workspaces is not installed: pip install 'polymodal\[dashboards\]'"):
        apply_layout(Layout("x", OWN), "p")


def test_applying_without_an_account_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match=r"no W&B account is configured.*polymodal report runs/ --html"):
        apply_layout(Layout("x", OWN), "p")


def test_the_wandb_workspace_has_every_panel():
    pytest.importorskip("wandb_workspaces")
    layout = Layout("x", OWN + dashboards.SHARED_SECTIONS)
    spec = dashboards.build_workspace(layout, "team", "project", "view")._to_model().model_dump(by_alias=True)
    sections = spec["spec"]["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections] == [s.title for s in layout.sections]
    assert [len(s["panels"]) for s in sections] == [len(s.panels) for s in layout.sections]
    line = sections[0]["panels"][0]["config"]
    assert (line["xAxis"], line["metrics"], line["groupBy"], line["groupArea"]) == (
        "step",
        ["val/a", "val/b"],
        "method.value",
        "stddev",
    )
