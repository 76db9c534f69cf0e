"""How the clients of a round are computed: one after the other, in worker processes, together, or on many machines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polymodal.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from fedcore.engines.base import Engine
    from fedcore.simulation import Simulation

__all__ = ["ENGINES", "check_engine", "make_engine"]

ENGINES = ("auto", "serial", "pool", "batched", "flower")


def check_engine(name: str) -> None:
    """UserError unless ``name`` is an engine, and what it needs is installed."""
    if name not in ENGINES:
        raise UserError(f"engine={name!r}; {did_you_mean(name, ENGINES)}known: {', '.join(ENGINES)}")
    if name == "flower":
        import fedcore.flower  # noqa: F401 (says what is missing)


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
    if name == "flower":
        from fedcore.flower.engine import engine_of

        return engine_of(simulation)
    return SerialEngine(federation)
