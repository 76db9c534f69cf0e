"""Flower as the engine for many machines: every algorithm as a Flower app; extra ``polymodal-fedcore[flower]``.

Importing this turns off what Flower and Ray would send to their makers, unless the environment says otherwise. Flower
reads its switches when it is imported, so the commands ``flower-superlink`` and ``flower-supernode`` need them in their
own environment: ``FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

from polymodal.errors import UserError

_EXPORTS = {
    "FlowerEngine": "fedcore.flower.engine",
    "FlowerStrategy": "fedcore.flower.strategy",
    "InProcessGrid": "fedcore.flower.inprocess",
    "attach": "fedcore.flower.engine",
    "client_app": "fedcore.flower.client",
    "remote_clients": "fedcore.flower.nodes",
    "server_app": "fedcore.flower.app",
    "to_record": "fedcore.flower.records",
    "to_tree": "fedcore.flower.records",
}

__all__ = ["SWITCHES", *sorted(_EXPORTS)]

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment under which nothing of Flower or Ray reaches out by itself; the last one ends a notice of Ray's."""

for _name, _value in SWITCHES.items():
    os.environ.setdefault(_name, _value)

if importlib.util.find_spec("flwr") is None:
    raise UserError("engine=flower needs Flower: pip install 'polymodal-fedcore[flower]'")


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
