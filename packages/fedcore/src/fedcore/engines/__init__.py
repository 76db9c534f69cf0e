"""How the clients of a round are computed: one after the other, in worker processes, or together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polymodal.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from fedcore.engines.base import Engine
    from fedcore.simulation import Simulation

__all__ = ["ENGINES", "check_engine", "make_engine"]

ENGINES = ("auto", "serial", "pool", "batched")


def check_engine(name: str) -> None:
    """UserError unless ``name`` is an engine."""
    if name not in ENGINES:
        raise UserError(f"engine={name!r}; {did_you_mean(name, ENGINES)}known: {', '.join(ENGINES)}")


def make_engine(simulation: Simulation) -> Engine:
    """The engine that the simulation asks for; ``auto`` begins with serial, and on CUDA with batched."""
    from fedcore.engines.serial import SerialEngine

    federation, name = simulation.federation, simulation.engine
    if name == "batched" or (name == "auto" and simulation.learner.device.type == "cuda"):
        from fedcore.engines.batched import batched_or_serial

        return batched_or_serial(federation)
    if name == "pool":
        from fedcore.engines.pool import PoolEngine

        return PoolEngine(federation, workers=simulation.workers)
    return SerialEngine(federation)
