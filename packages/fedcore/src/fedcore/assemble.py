"""From options to a simulation: with adapters where ranks are given, private where the algorithm is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polymodal.errors import UserError
from torch import nn

from fedcore.algorithm import Algorithm
from fedcore.lora_settings import LoraConfig
from fedcore.privacy_settings import PrivacyConfig
from fedcore.simulation import Simulation

__all__ = ["assemble"]


def assemble(
    model: nn.Module,
    task: Callable[[nn.Module], Any],
    clients: Sequence[Any],
    algorithm: Algorithm,
    *,
    lora: LoraConfig,
    privacy: PrivacyConfig,
    **options: Any,
) -> Simulation:
    """A simulation.

    Args:
        model: the module with its first weights; with adapters, the base under them.
        task: what is trained, made of a module.
        clients: one data set a client.
        algorithm: the method.
        lora: adapters.
        privacy: the mechanism, where the algorithm is private.
        options: of ``Simulation``.

    Raises:
        UserError: options that do not fit each other or the model.
    """
    made: Any = task(model) if not lora.on else None
    if lora.on:
        from fedcore.lora.job import adapted

        modules, options["ranks"] = adapted(model, lora, algorithm, len(clients), options.get("seed", 0))
        made = lambda rank: task(modules(rank))  # noqa: E731
    elif algorithm.adapters:
        raise UserError(f"{type(algorithm).__name__} trains adapters; give their ranks, e.g. --lora.ranks 2,4,6")
    if algorithm.private:
        from fedcore.privacy.simulation import PrivateSimulation

        return PrivateSimulation(made, clients, algorithm, privacy=privacy, **options)
    return Simulation(made, clients, algorithm, **options)
