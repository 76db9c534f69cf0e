"""What a private run shows: the report beside every result, and nothing else that clients' data made."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, ClassVar, cast

from polymodal.files import write_json
from polymodal.run import Run

if TYPE_CHECKING:
    from fedcore.privacy.report import PrivacyReport
    from fedcore.privacy.simulation import PrivateSimulation
    from fedcore.privacy_settings import PrivacyConfig
    from fedcore.settings import FedConfig
    from fedcore.simulation import Simulation

__all__ = [
    "LEDGER",
    "REPORT",
    "GatedRun",
    "begin",
    "gated",
    "planned",
    "private",
    "say_doubts",
    "spent",
    "write_report",
]

log = logging.getLogger(__name__)
LEDGER = "privacy_ledger.jsonl"
REPORT = "privacy.json"


class GatedRun(Run):
    """A run whose loggers, W&B among them, get only what is private or made without clients' data.

    Losses, counts, bytes and times of a cohort are none of it: times and bytes tell how many clients took part.
    """

    shown: ClassVar[tuple[str, ...]] = ("privacy/", "val/", "test/", "train/lr")

    def log(self, metrics: dict[str, float], step: int, epoch: int | None = None) -> None:
        """Write those of the metrics that may be seen."""
        seen = {name: value for name, value in metrics.items() if name.startswith(self.shown)}
        if seen:
            super().log(seen, step, epoch)

    def log_table(self, key: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Tables are about single clients or samples: none is written."""


def private(simulation: Simulation) -> PrivateSimulation | None:
    """The simulation, where its rounds go through a privacy mechanism."""
    return cast("PrivateSimulation", simulation) if simulation.private else None


def gated(simulation: Simulation) -> bool:
    """Whether what clients' data made stays unseen: a private run, unless unsafe metrics were asked for."""
    found = private(simulation)
    return found is not None and not found.privacy.unsafe_debug_metrics


def spent(simulation: Simulation) -> dict[str, float]:
    """Epsilon and delta so far, by their full names; empty where nothing is private.

    Epsilon is up to 1e-3 of it larger than in the report, which takes a hundredth of the time.
    """
    found = private(simulation)
    return {} if found is None else {"privacy/epsilon": found.epsilon_now(), "privacy/delta": found.delta}


def planned(simulation: Simulation, rounds: int) -> list[str]:
    """A line on what the whole run would cost; none where nothing is private."""
    found = private(simulation)
    if found is None:
        return []
    from fedcore.privacy import accounting

    q, sigma, kind = found.sampling_rate, found.noise_multiplier, found.privacy.sampling
    epsilon = math.inf if found.reasons else accounting.epsilon(q, sigma, rounds, found.delta, sampling=kind)
    clip = "by client" if found.privacy.clip is None else f"{found.privacy.clip:g}"
    return [
        f"privacy     epsilon {epsilon:.4g} at delta {found.delta:.3g} (PLD), sigma {sigma:g}, C {clip}, "
        f"{kind} cohorts of {found.denominator:g} expected"
    ]


# ------------------------------------------------------------------ beginning and end of a run


def begin(run: Run, simulation: Simulation) -> None:
    """Keep the ledger in the run folder. A report of before the run was resumed says too little from now on: it goes.

    Raises:
        UserError: the ledger cannot be read or written.
    """
    found = private(simulation)
    if found is not None:
        (run.folder / REPORT).unlink(missing_ok=True)
        found.open_ledger(run.folder / LEDGER)


def write_report(run: Run, simulation: Simulation) -> PrivacyReport | None:
    """``privacy.json`` and the same in the manifest; None where nothing is private."""
    found = private(simulation)
    if found is None:
        return None
    report = found.report()
    write_json(run.folder / REPORT, report.to_dict())
    run.note(privacy=report.to_dict())
    return report


def say_doubts(config: FedConfig, privacy: PrivacyConfig, simulation: Simulation) -> None:
    """Warn of what is allowed, but hardly meant; of the clip, the simulation itself does.

    Args:
        config: of the run.
        privacy: the mechanism.
        simulation: the federation.
    """
    found = private(simulation)
    if found is None:
        given = [name for name in ("clip", "noise_multiplier", "target_epsilon") if getattr(privacy, name) is not None]
        if given:
            log.warning(
                "%s is not private: privacy.%s has no effect; choose dp_fedpgn, dp_fedavg or another private algorithm",
                config.algorithm,
                given[0],
            )
        return
    if found.delta * found.num_clients >= 1:
        log.warning(
            "privacy.delta=%.3g is not below 1/N = %.3g: publishing one client's data as it is would count as private; "
            "take a tenth of that or less",
            found.delta,
            1 / found.num_clients,
        )
