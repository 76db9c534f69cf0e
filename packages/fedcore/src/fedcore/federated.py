"""``federate``: any module of any package, trained over many clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedcore.algorithm import Algorithm
from fedcore.privacy_settings import PrivacyConfig
from fedcore.simulation import Simulation

__all__ = ["federate"]


def federate(
    module: Any,
    datasets: Sequence[Any],
    algorithm: Algorithm | str = "fedavg",
    *,
    privacy: PrivacyConfig | None = None,
    **options: Any,
) -> Simulation:
    """A simulation that trains ``module`` over ``datasets``, one a client.

    Args:
        module: a ``polymodal.TaskModule`` (its ``loss`` and ``metrics`` are used), a plain LightningModule (runs
            serial, its own optimizers and logging ignored, with a notice), or a torch module.
        datasets: map-style datasets; samples are collated as by a DataLoader, or by the dataset's own
            ``batch(indices, generator)``.
        algorithm: an algorithm or its name.
        privacy: client-level differential privacy, through which every upload goes; the simulation is a
            ``fedcore.privacy.PrivateSimulation`` then, with ``report()`` and ``epsilon``.
        options: of ``Simulation``.

    Raises:
        UserError: unknown algorithm, data that the module does not take, or, with ``privacy``, what no guarantee can be
            given for.
    """
    from fedcore.algorithms import create

    chosen: Algorithm = create(algorithm) if isinstance(algorithm, str) else algorithm
    if privacy is not None:
        from fedcore.privacy.simulation import PrivateSimulation

        return PrivateSimulation(module, datasets, chosen, privacy=privacy, **options)
    return Simulation(module, datasets, chosen, **options)
