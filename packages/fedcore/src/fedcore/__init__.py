"""Federated optimizers, adapters and privacy, correct baselines, and their simulation.

Importing ``fedcore`` loads no torch; the names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Algorithm": "fedcore.algorithm",
    "History": "fedcore.history",
    "RoundError": "fedcore.simulation",
    "Simulation": "fedcore.simulation",
    "federate": "fedcore.federated",
}
_MODULES = ("algorithms", "flower", "lora", "partition", "privacy")

__all__ = [
    "Algorithm",
    "History",
    "RoundError",
    "Simulation",
    "__version__",
    "algorithms",
    "federate",
    "flower",
    "lora",
    "partition",
    "privacy",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fedcore.{name}")
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
