"""What the doctor finds in whole and in broken installations."""

import json
import sys
from importlib import metadata

import pytest
from polymodal import doctor
from polymodal.doctor import Finding, check_module, examine, report_text


def states(findings):
    return {f.topic: f.state for f in findings}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path in which distributions and modules can be laid down."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def lay(name, module=None, requires=(), extras=(), files=(), editable=None):
        info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", "Summary: for a test"]
        lines += [f"Provides-Extra: {e}" for e in extras] + [f"Requires-Dist: {r}" for r in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "RECORD").write_text("".join(f"{f},,\n" for f in files))
        if editable is not None:
            (info / "direct_url.json").write_text(
                json.dumps({"url": editable.as_uri(), "dir_info": {"editable": True}})
            )
        if module:
            (folder / module).mkdir()
            (folder / module / "__init__.py").write_text("")
        return folder

    return lay


def test_this_installation_is_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    findings = examine(tmp_path / "runs")
    assert [f for f in findings if f.state == "fail"] == []
    topics = states(findings)
    for topic in ("python", "libraries", "polymodal", "slt", "css", "wandb", "runs", "cache", "threads"):
        assert topic in topics
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "cache").exists()


def test_a_module_of_ours_is_recognised_by_its_files(site):
    site("polymodal-alpha", "alpha", files=["alpha/__init__.py"])
    assert check_module("polymodal-alpha", "alpha").state == "ok"


def test_an_editable_module_is_recognised_by_its_source(site, tmp_path):
    folder = site("polymodal-beta", "beta", editable=tmp_path / "site")
    assert check_module("polymodal-beta", "beta").detail.endswith(str(folder / "beta"))
    site("polymodal-gamma", "gamma", editable=tmp_path / "elsewhere")
    assert check_module("polymodal-gamma", "gamma").state == "fail"


def test_a_stranger_with_our_import_name_is_named(site):
    site("polymodal-delta")
    site("delta", "delta", files=["delta/__init__.py"])
    finding = check_module("polymodal-delta", "delta")
    assert finding.state == "fail"
    assert "which belongs to delta, not polymodal-delta" in finding.detail
    assert finding.remedy == "pip uninstall delta"


def test_a_distribution_without_its_module_is_broken(site):
    site("polymodal-epsilon")
    assert check_module("polymodal-epsilon", "epsilon").state == "fail"


def test_missing_and_old_requirements_are_broken(site):
    site("polymodal-zeta", "zeta", requires=["nowhere-to-be-found>=1", "numpy>=999"])
    found = {f.topic: f for f in doctor._distributions(["polymodal-zeta"])}
    assert found["nowhere-to-be-found"].detail == "missing (for polymodal-zeta)"
    assert found["numpy"].detail == f"version {metadata.version('numpy')}, needs >=999 (for polymodal-zeta)"
    assert {found[t].state for t in ("nowhere-to-be-found", "numpy")} == {"fail"}


def test_extras_say_what_is_missing_and_never_fail(site):
    requires = ["nowhere-to-be-found; extra == 'far'", "numpy; extra == 'near'", "never; python_version < '3'"]
    site("polymodal-eta", "eta", requires=requires, extras=["far", "near"])
    found = {f.topic: f for f in doctor._extras(["polymodal-eta"])}
    assert (found["eta[far]"].state, found["eta[far]"].detail) == ("note", "not installed: nowhere-to-be-found")
    assert "pip install 'polymodal-eta[far]'" in found["eta[far]"].remedy
    assert found["eta[near]"].state == "ok"


def test_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("")
    assert states(doctor._folders(tmp_path / "runs")) == {"runs": "ok", "cache": "ok"}
    broken = next(iter(doctor._folders(tmp_path / "file")))
    assert (broken.state, broken.remedy) == ("fail", "choose another folder or mend its permissions")
    usage = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert states(doctor._folders(tmp_path))["runs"] == "warn"
    usage.free = 2**20
    assert states(doctor._folders(tmp_path))["runs"] == "fail"


@pytest.mark.parametrize(("mode", "state"), [("offline", "note"), ("online", "ok")])
def test_the_account_is_seen_as_the_loggers_see_it(monkeypatch, mode, state):
    monkeypatch.setenv("WANDB_MODE", mode)
    (finding,) = doctor._account()
    assert finding.state == state
    assert f"logged {mode} (WANDB_MODE={mode})" in finding.detail


def test_a_torch_that_cannot_be_loaded_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (finding,) = doctor._devices()
    assert (finding.state, finding.remedy) == ("fail", "reinstall torch")


def test_text_puts_remedies_below_and_counts():
    text = report_text([Finding("ok", "a", "fine"), Finding("fail", "longer", "bad", "mend it")])
    assert text.splitlines() == [
        "ok    a       fine",
        "fail  longer  bad",
        "              -> mend it",
        "",
        "1 broken, 0 to look at",
    ]
    assert report_text([Finding("note", "a", "b")]).endswith("all well")
