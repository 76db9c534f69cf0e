"""``fed-privacy`` as its users call it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fedcore import privacy_command
from fedcore.privacy import epsilon
from fedcore.privacy_command import up

PROGRAM = Path(sys.executable).parent / "fed-privacy"


@pytest.fixture
def fed_privacy(monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))  # put back after the command

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fed-privacy", *map(str, arguments)])
        code = privacy_command.main()
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


def test_options_alone_ask_for_epsilon() -> None:
    """The figure of specification 3.9, by the console script."""
    options = ["--sampling_rate", ".1", "--noise_multiplier", ".8", "--rounds", "301", "--delta", ".002"]
    done = subprocess.run([PROGRAM, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "epsilon = 13.49"
    assert re.search(r"PLD \(dp-accounting [\d.]+\); RDP gives 15\.9[34]", done.stdout)
    assert "add or remove it" in done.stdout
    assert not done.stderr


def test_fixed_cohorts_are_not_amplified(fed_privacy):
    options = ["epsilon", "--sampling_rate=1", "--noise_multiplier=5", "--rounds=50", "--delta=1e-5"]
    code, poisson, _ = fed_privacy(*options)
    assert code == 0
    assert poisson.startswith("epsilon = 6.57")
    code, fixed, _ = fed_privacy(*options, "--sampling=fixed")
    assert code == 0
    assert float(fixed.split()[2]) > 2 * float(poisson.split()[2])
    assert "replace it" in fixed


def test_calibration_keeps_the_target_and_is_tight(fed_privacy):
    code, out, err = fed_privacy(
        "calibrate", "--target_epsilon=3", "--sampling_rate=0.05", "--rounds=20", "--clients=1000"
    )
    assert code == 0, err
    sigma = float(re.match(r"noise_multiplier = ([\d.]+)\n", out)[1])
    assert epsilon(0.05, sigma, 20, 1e-4) <= 3
    assert epsilon(0.05, sigma - 2e-3, 20, 1e-4) > 3
    assert "delta       0.0001" in out


def test_curves_are_a_table_and_a_picture(fed_privacy, tmp_path):
    path = tmp_path / "curve.png"
    code, out, err = fed_privacy(
        "curve", "--noise_multiplier=1.1,2", "--sampling_rate=0.05", "--rounds=12", "--delta=1e-3", "--points=3",
        f"--out={path}",
    )  # fmt: skip
    assert code == 0, err
    assert path.read_bytes().startswith(b"\x89PNG")
    rows = [line.split("|")[1:4] for line in out.splitlines() if re.match(r"\|\s*\d+ ", line)]
    assert [int(row[0]) for row in rows] == [4, 8, 12]
    for column in (1, 2):
        values = [float(row[column]) for row in rows]
        assert values == sorted(values)
    assert all(float(row[1]) > float(row[2]) for row in rows)
    assert float(rows[-1][1]) == pytest.approx(epsilon(0.05, 1.1, 12, 1e-3), rel=1e-3)


@pytest.mark.slow
def test_the_mechanism_is_audited(fed_privacy):
    code, out, err = fed_privacy("audit", "--trials=1000")
    assert code == 0, err
    assert "consistent" in out


def test_what_is_missing_or_out_of_range_is_one_line(fed_privacy):
    good = ["--sampling_rate=0.1", "--noise_multiplier=0.8", "--rounds=3", "--delta=1e-3"]
    for arguments, said in (
        (good[1:], "--sampling_rate missing"),
        ([good[0]], "--noise_multiplier, --rounds, --delta missing"),
        (["--sampling_rate=1.5", *good[1:]], "sampling_rate=1.5"),
        ([*good[:3], "--delta=1"], "delta=1"),
        ([*good[:2], "--rounds=-1", good[3]], "rounds=-1"),
        ([*good, "--clients=-3"], "clients=-3"),
        (["calibrate", *good[:1], *good[2:]], "--target_epsilon missing"),
        (["calibrate", "--target_epsilon=0", *good[:1], *good[2:]], "target_epsilon"),
        (["curve", *good[:1], *good[2:]], "--noise_multiplier missing"),
        (["curve", "--noise_multiplier=a,b", *good[:1], *good[2:]], "noise_multiplier"),
        (["curve", *good, "--points=0"], "points=0"),
        (["budget"], "unknown command"),
        ([*good, "--nosuch=1"], "nosuch"),
    ):
        code, _, err = fed_privacy(*arguments)
        assert code == 2, arguments
        assert said in err.splitlines()[-1], (arguments, err)
        assert "Traceback" not in err


def test_a_delta_as_large_as_one_over_the_clients_is_warned_of(fed_privacy):
    good = ["--sampling_rate=0.1", "--noise_multiplier=2", "--rounds=3"]
    code, _, err = fed_privacy(*good, "--clients=500", "--delta=0.002")
    assert code == 0
    assert "not below 1/N = 0.002" in err
    code, out, err = fed_privacy(*good, "--clients=500")
    assert code == 0
    assert not err
    assert "delta       0.0002" in out


def test_help_names_the_commands(fed_privacy):
    code, out, _ = fed_privacy("--help")
    assert code == 0
    assert all(name in out for name in ("epsilon", "calibrate", "curve", "audit", "fed-privacy --sampling_rate 0.1"))
    code, out, _ = fed_privacy("calibrate", "--help")
    assert code == 0
    assert "--target_epsilon" in out


def test_bounds_are_rounded_up():
    assert [up(value) for value in (13.4881, 0.50001, 310.62, float("inf"), 0.0, 2.0, 73634.2)] == [
        "13.49", "0.5001", "310.7", "inf", "0", "2.000", "73640",
    ]  # fmt: skip
