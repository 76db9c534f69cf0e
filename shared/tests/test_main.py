"""The command ``polymodal`` from outside: exit codes, one-line errors, light imports."""

import importlib.util
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from polymodal import main as command
from polymodal.discovery import Package, installed_packages, listing
from polymodal.errors import UserError
from polymodal.registry import MethodInfo

_spec = importlib.util.spec_from_file_location("_run_factory", Path(__file__).with_name("_run_factory.py"))
factory = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(factory)

COMMANDS = ("report", "compare", "list", "doctor", "dashboard", "experiments")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Call ``polymodal`` in an empty folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["polymodal", *map(str, arguments)])
        code = command.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['polymodal', '--help']\n"
        "from polymodal.main import main; main()\n"
        "print([m for m in ('torch', 'lightning', 'wandb', 'matplotlib', 'jsonargparse') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "polymodal.main", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_starts_with_an_example_and_fits_two_screens(call, name):
    code, out, _ = call(name, "--help")
    assert code == 0
    assert f"Example:\n  polymodal {name}" in out
    assert len(out.splitlines()) < 50


def test_no_command_and_an_unknown_one(call):
    code, out, _ = call()
    assert code == 2
    assert out.startswith("usage: polymodal COMMAND")
    assert call("reprot")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "nowhere"), "polymodal report: error: no such folder: nowhere; give a run folder"),
        (("report", "--nonsense"), "polymodal report: error: unrecognized arguments: --nonsense; `polymodal report"),
        (("report", "--format", "pdf"), "polymodal report: error: argument --format: invalid choice: 'pdf'"),
        (("compare", "a"), "polymodal compare: error: 1 run given; expected two or more run folders"),
        (("list", "--package", "xyz"), "polymodal list: error: --package xyz: not installed; here are css"),
        (("dashboard", "--package", "xyz"), "polymodal dashboard: error: --package xyz: installed packages are css"),
        (("experiments", "run", "e.yaml"), "polymodal experiments: error: e.yaml cannot be read"),
        (("experiments", "run", "e.yaml", "--jobs", "x"), "polymodal experiments: error: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(call, arguments, message):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert len(err.splitlines()) == 1


def test_report_prints_and_writes(call, tmp_path):
    for method, score in (("ssaw", 90.0), ("none", 50.0)):
        for seed in (0, 1):
            factory.write_run(
                tmp_path / "runs" / "slt" / f"{method}{seed}",
                method=method,
                seed=seed,
                metrics={"test/bleu4": score + seed, "test/chrf": score},
                curves={"train/loss": [(1, 0, 2.0), (2, 0, 1.0)]},
                config_hash=method,
            )
    code, out, err = call("report", "--against", "none", "--metric", "test/bleu4", "--html", "--plot")
    assert code == 0
    assert "| ssaw          |     2 | +40.00 [+40.00, +40.00] |" in out
    assert "test/chrf" not in out
    assert err.splitlines() == ["wrote runs/report/report.html", "wrote runs/report/curves/train-loss.png"]
    code, out, err = call("report", "runs/slt", "--format", "csv", "--where", "method=ssaw", "seed=1", "--out", "o")
    assert len(out.splitlines()) == 3
    assert (tmp_path / "o" / "report.csv").read_text() == out
    assert call("report", "--debug", "--format", "html")[1].startswith("<!doctype html>")


def test_compare_prints_differences(call, tmp_path):
    a = factory.write_run(tmp_path / "a")
    b = factory.write_run(tmp_path / "b", metrics={"test/bleu4": 80.0})
    code, out, _ = call("compare", a, b)
    assert code == 0
    assert "| test/bleu4 | 90.00 | 80.00 | -10.00 |" in out


def test_list_names_packages_without_methods(call):
    code, out, _ = call("list")
    assert code == 0
    for package in ("css", "fedcore", "missing_modal", "slt", "vlm_accel"):
        assert f"\n{package}: " in f"\n{out}"


def test_listing_of_methods_broken_tables_and_empty_packages():
    row = MethodInfo("ssaw", "m:C", "Liu et al. 2025", "weights tokens", fidelity="reconstruction")
    packages = [
        Package("polymodal-slt", "slt", "1.0", "translation", {"fusion": (row,)}),
        Package("polymodal-css", "css", "1.0", "segmentation", {}),
        Package("polymodal-bad", "bad", "1.0", "broken", {}, "bad:T cannot be loaded (ImportError: no)"),
    ]
    text = listing(packages)
    assert "    ssaw  reconstruction  Liu et al. 2025\n          weights tokens" in text
    assert "css: segmentation (polymodal-css 1.0)\n  not here yet: this package registers no method" in text
    assert "broken: bad:T cannot be loaded (ImportError: no)" in text
    assert listing(packages, "polymodal-css").startswith("css:")
    assert listing(packages, form="md").splitlines()[2].startswith("| slt     | fusion | ssaw   | reconstruction |")
    with pytest.raises(UserError, match="here are slt, css, bad"):
        listing(packages, "x")


def test_installed_packages_are_found_by_their_metadata():
    found = {p.module: p for p in installed_packages()}
    assert set(found) >= {"css", "fedcore", "missing_modal", "slt", "vlm_accel"}
    assert "polymodal" not in found
    assert found["missing_modal"].name == "polymodal-missing-modal"
    assert all(p.summary and not p.problem for p in found.values())


def test_doctor_exit_code_follows_its_findings(call, monkeypatch):
    from polymodal import doctor

    monkeypatch.setattr(doctor, "examine", lambda runs: [doctor.Finding("ok", "a", str(runs))])
    assert call("doctor", "--runs", "elsewhere") == (0, "ok    a  elsewhere\n\nall well\n", "")
    monkeypatch.setattr(doctor, "examine", lambda runs: [doctor.Finding("fail", "a", "b", "c")])
    assert call("doctor")[0] == 1


def test_dashboard_dry_run_needs_no_account(call):
    code, out, _ = call("dashboard", "--package", "slt", "--dry-run")
    tree = json.loads(out)
    assert (code, tree["package"]) == (0, "slt")
    assert "Training" in [s["title"] for s in tree["sections"]]


def test_experiments_plan_and_failing_run(call, tmp_path):
    (tmp_path / "e.yaml").write_text(
        "{name: e, command: polymodal nonsense, cells: {a: {x: 1}}, seeds: [0], metrics: [test/a]}"
    )
    assert call("experiments", "plan", "e.yaml") == (0, "polymodal nonsense --x=1 --seed=0\n", "")
    code, out, err = call("experiments", "run", "e.yaml")
    assert code == 1
    assert out.startswith("0 of 1 cells finished: results/e\nfailed: a-seed0")
    assert "1/1 a-seed0: failed: exit code 2: polymodal: error: unknown command 'nonsense'" in err
    assert call("experiments", "table", "e.yaml")[0] == 2
