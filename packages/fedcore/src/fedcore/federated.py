"""``federate``: any module of any package, trained over many clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedcore.algorithm import Algorithm
from fedcore.simulation import Simulation

__all__ = ["federate"]


def federate(module: Any, datasets: Sequence[Any], algorithm: Algorithm | str = "fedavg", **options: Any) -> Simulation:
    """A simulation that trains ``module`` over ``datasets``, one a client.

    Args:
        module: a ``polymodal.TaskModule`` (its ``loss`` and ``metrics`` are used), a plain LightningModule (runs
            serial, its own optimizers and logging ignored, with a notice), or a torch module.
        datasets: map-style datasets; samples are collated as by a DataLoader, or by the dataset's own
            ``batch(indices, generator)``.
        algorithm: an algorithm or its name.
        options: of ``Simulation``.

    Raises:
        UserError: unknown algorithm, or data that the module does not take.
    """
    from fedcore.algorithms import create

    chosen: Algorithm = create(algorithm) if isinstance(algorithm, str) else algorithm
    return Simulation(module, datasets, chosen, **options)
