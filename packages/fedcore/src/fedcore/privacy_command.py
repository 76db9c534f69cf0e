"""``fed-privacy``: epsilon of a planned run, the noise for a target, a curve over rounds, an audit of the mechanism."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli import command, subcommands
from polymodal.errors import UserError
from polymodal.tables import markdown

from fedcore.privacy_command_settings import AuditConfig, CalibrateConfig, CurveConfig, EpsilonConfig, Releases

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["audit", "calibrate", "curve", "epsilon", "main", "up"]

EXAMPLE = """
fed-privacy --sampling_rate 0.1 --noise_multiplier 0.8 --rounds 301 --delta 0.002    # epsilon = 13.49
fed-privacy calibrate --target_epsilon 3 --sampling_rate 0.1 --rounds 301 --clients 500
fed-privacy curve --noise_multiplier 0.8,1.2 --sampling_rate 0.1 --rounds 301 --delta 0.002 --out curve.png
fed-privacy audit --noise_multiplier 1
"""
UNIT = {
    "poisson": "all data of one client; add or remove it; Poisson sampling, cohorts and noise secret; trusted server",
    "fixed": "all data of one client; replace it (sensitivity 2 C); cohorts of one size, not amplified; trusted server",
}


def main() -> int:
    """Entry point of ``fed-privacy``; returns the exit code. Options without a command ask for epsilon."""
    words = sys.argv[1:]
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
        return COMMANDS["epsilon"][1](words)
    return subcommands(COMMANDS, prog="fed-privacy", example=EXAMPLE)


def _run(name: str, function: Callable[[Any], None], config: type[Any]) -> Callable[[Sequence[str]], int]:
    return lambda words: command(function, config, prog=f"fed-privacy {name}", example=EXAMPLE, argv=words)


# ------------------------------------------------------------------ commands


def epsilon(config: EpsilonConfig) -> None:
    """Print epsilon, PLD first, RDP beside it, both rounded up.

    Raises:
        UserError: an option that is missing or out of range.
    """
    from fedcore.privacy import accounting

    config.check()
    sigma = config.noise_multiplier or 0.0
    tight, renyi = (
        accounting.epsilon(noise_multiplier=sigma, accountant=kind, **config.how) for kind in ("pld", "rdp")
    )
    _say(f"epsilon = {up(tight)}")
    _say_rows(config, {"accountant": f"PLD ({accounting.library_version()}); RDP gives {up(renyi)}"})


def calibrate(config: CalibrateConfig) -> None:
    """Print the least noise multiplier for a target, rounded up, and what it gives.

    Raises:
        UserError: an option that is missing or out of range, or a target that no noise reaches.
    """
    from fedcore.privacy import accounting

    config.check()
    sigma = accounting.calibrate(config.target_epsilon or 0.0, accountant=config.accountant, **config.how)
    found = {
        kind: up(accounting.epsilon(noise_multiplier=sigma, accountant=kind, **config.how)) for kind in ("pld", "rdp")
    }
    _say(f"noise_multiplier = {sigma:.4f}")
    _say_rows(config, {"epsilon": f"PLD {found['pld']}; RDP {found['rdp']} ({accounting.library_version()})"})


def curve(config: CurveConfig) -> None:
    """Print epsilon by round, a column a noise multiplier; with ``out``, draw it.

    Raises:
        UserError: an option that is missing or out of range, or a picture that cannot be written.
    """
    from fedcore.privacy import accounting

    config.check()
    lines = {
        sigma: accounting.curve(noise_multiplier=sigma, points=config.points, **config.how)
        for sigma in config.noise_multiplier
    }
    rounds = [n for n, _ in next(iter(lines.values()))]
    rows = [[str(n), *(up(line[i][1]) for line in lines.values())] for i, n in enumerate(rounds)]
    _say(markdown(["round", *(f"epsilon, sigma {sigma:g}" for sigma in lines)], rows))
    _say_rows(config, {"accountant": f"PLD ({accounting.library_version()})"})
    if config.out is not None:
        from polymodal.files import write_bytes

        write_bytes(Path(config.out).expanduser(), picture(lines, config))
        _say(f"picture     {config.out}")


def audit(config: AuditConfig) -> None:
    """Attack the mechanism with a canary client.

    Raises:
        UserError: an option out of range, or a bound above the epsilon that is reported: the mechanism leaks.
    """
    from polymodal.seeding import set_threads

    from fedcore.privacy import audit as attack

    set_threads(1)
    result = attack(**dataclasses.asdict(config))
    _say(result.text())
    if not result.passed:
        raise UserError("the audit contradicts the reported epsilon: do not use this mechanism, and report it")


COMMANDS: Mapping[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "epsilon": ("epsilon after so many rounds", _run("epsilon", epsilon, EpsilonConfig)),
    "calibrate": ("least noise multiplier for a target epsilon", _run("calibrate", calibrate, CalibrateConfig)),
    "curve": ("epsilon by round, as table and picture", _run("curve", curve, CurveConfig)),
    "audit": ("lower bound on epsilon, from trials with a canary client", _run("audit", audit, AuditConfig)),
}

# ------------------------------------------------------------------ what is said


def up(value: float) -> str:
    """Four significant digits, rounded up: a bound stays one.

    >>> up(13.4881), up(0.50001), up(310.62), up(math.inf)
    ('13.49', '0.5001', '310.7', 'inf')
    """
    if not math.isfinite(value) or value <= 0:
        return f"{value:g}"
    digits = 3 - math.floor(math.log10(value))
    scaled = math.ceil(round(value * 10**digits, 6)) / 10**digits
    return f"{scaled:.{max(0, digits)}f}"


def _say_rows(config: Releases, rows: Mapping[str, str]) -> None:
    """What the number means, a line a fact."""
    facts = {
        **rows,
        "delta": f"{config.delta:g}",
        "unit": UNIT[config.sampling],
        "not in it": "choosing settings by their results; metrics on clients' data",
    }
    for name, text in facts.items():
        _say(f"{name:<11} {text}")
    if config.clients and config.delta is not None and config.delta >= 1 / config.clients:
        sys.stderr.write(
            f"fed-privacy: delta={config.delta:g} is not below 1/N = {1 / config.clients:g}: publishing one client's "
            "data as it is would count as private; take a tenth of it or less\n"
        )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def picture(lines: Mapping[float, Sequence[tuple[int, float]]], config: Releases) -> bytes:
    """Epsilon over rounds as PNG, a line a noise multiplier.

    Raises:
        UserError: no finite value.
    """
    import io

    from matplotlib.figure import Figure
    from polymodal.curves import color

    finite = {sigma: [point for point in line if math.isfinite(point[1])] for sigma, line in lines.items() if sigma > 0}
    if not any(finite.values()):
        raise UserError("no curve to draw: epsilon is infinite without noise; raise --noise_multiplier")
    figure = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained")
    axes: Axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for index, (sigma, line) in enumerate(finite.items()):
        axes.plot([n for n, _ in line], [e for _, e in line], color=color(index), label=f"sigma {sigma:g}")
    axes.set(xlabel="round", ylabel=f"epsilon at delta {config.delta:g}")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{config.sampling} sampling, q {config.sampling_rate:g}", loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
