"""Client-level differential privacy: mechanism, ledger, accounting, report, audit.

Importing ``fedcore.privacy`` loads neither torch nor dp-accounting; the names below are imported when they are first
used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedcore.privacy.accounting import calibrate, curve, epsilon, epsilon_of
    from fedcore.privacy.auditing import AuditResult, audit
    from fedcore.privacy.ledger import Event, Ledger
    from fedcore.privacy.mechanism import ClientDPMechanism
    from fedcore.privacy.noise import NoiseSource
    from fedcore.privacy.report import PrivacyReport
    from fedcore.privacy.simulation import BudgetError, PrivateSimulation
    from fedcore.privacy_settings import PrivacyConfig

__all__ = [
    "AuditResult",
    "BudgetError",
    "ClientDPMechanism",
    "Event",
    "Ledger",
    "NoiseSource",
    "PrivacyConfig",
    "PrivacyReport",
    "PrivateSimulation",
    "audit",
    "calibrate",
    "curve",
    "epsilon",
    "epsilon_of",
]

_EXPORTS = {
    **dict.fromkeys(("calibrate", "curve", "epsilon", "epsilon_of"), "fedcore.privacy.accounting"),
    **dict.fromkeys(("AuditResult", "audit"), "fedcore.privacy.auditing"),
    **dict.fromkeys(("Event", "Ledger"), "fedcore.privacy.ledger"),
    "ClientDPMechanism": "fedcore.privacy.mechanism",
    "NoiseSource": "fedcore.privacy.noise",
    "PrivacyReport": "fedcore.privacy.report",
    **dict.fromkeys(("BudgetError", "PrivateSimulation"), "fedcore.privacy.simulation"),
    "PrivacyConfig": "fedcore.privacy_settings",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
